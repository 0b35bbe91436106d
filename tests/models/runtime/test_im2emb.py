"""The bundle as a library: on its own, among strangers' packages, in sentence-transformers, and in README's search.

pytest tests/models/runtime/test_im2emb.py
"""

import copy
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from core.paths import ROOT
from datagen.dataset.targets import minilm_wheel
from models import checkpoint
from models.ensemble.ensemble import Member, load_ensemble, write_ensemble
from models.export import runtimes
from models.export.export import export
from models.regressor import Regressor, make
from models.runtime.decode import decode
from models.runtime.model import network, read_config
from tests import small_dataset
from tests.commands import contents

MINILM = "all-MiniLM-L6-v2"
E = 384
COLOURS = {
    "a red rose": (220, 20, 40),
    "the blue sky": (90, 160, 250),
    "a field of grass": (40, 160, 50),
    "a ripe banana": (240, 220, 60),
    "snow on a mountain": (245, 245, 250),
    "a starless night": (10, 10, 20),
}


@pytest.fixture(scope="module", autouse=True)
def own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers keeps the code of models, and loads it from."""
    place = str(tmp_path_factory.mktemp("hf_modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each colour, of several sizes; a square in it keeps them apart from plain ground."""
    folder = tmp_path_factory.mktemp("shown") / "pictures"
    folder.mkdir()
    for i, (name, colour) in enumerate(COLOURS.items()):
        text = f"square {' '.join(map(str, colour))} on {' '.join(str(c // 2) for c in colour)}"
        (folder / f"{name}.png").write_bytes(small_dataset.image(text, 40 + 3 * i))
    return folder


@pytest.fixture(scope="module")
def learned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows these images by heart: least squares from random features to their names' vectors."""
    model = make("test_vit", "random", 32, E).eval()
    decoded = [decode((images / f"{name}.png").read_bytes()) for name in COLOURS]
    encoder = SentenceTransformer(str(minilm_wheel()), device="cpu")
    target_BE = torch.from_numpy(encoder.encode(list(COLOURS), normalize_embeddings=True))
    with torch.no_grad():
        features_BD = torch.cat([model.features(_fitted(model, image)) for image in decoded])
        feature_BD = features_BD - features_BD.mean(0)
        weight_DE = torch.linalg.lstsq(feature_BD, target_BE - target_BE.mean(0)).solution
        model.head.get_parameter("weight").copy_(weight_DE.T)
        model.head.get_parameter("bias").copy_(target_BE.mean(0) - features_BD.mean(0) @ weight_DE)
    folder = tmp_path_factory.mktemp("learned") / "best"
    checkpoint.save(folder, model, normalize(target_BE.mean(0), dim=0), decoded, {"encoder": MINILM})
    return folder


def _fitted(model: Regressor, image_CHW: torch.Tensor) -> torch.Tensor:
    from models.runtime.preprocess import resize_and_crop

    return resize_and_crop(image_CHW, model.spec.preprocessing)[None]


@pytest.fixture(scope="module")
def bundle(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export(learned, out)
    return out


@pytest.fixture(scope="module")
def library(bundle: Path) -> ModuleType:
    """im2emb.py of the bundle."""
    spec = importlib.util.spec_from_file_location("im2emb_of_the_test", bundle / "im2emb.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paths(images: Path) -> list[str]:
    return sorted(map(str, images.iterdir()))


@pytest.fixture(scope="module")
def expected(learned: Path, paths: list[str]) -> torch.Tensor:
    """By the checkpoint itself: z_BE."""
    return checkpoint.load(learned).embed([decode(Path(path).read_bytes()) for path in paths])


@pytest.fixture(scope="module")
def transformer(bundle: Path) -> SentenceTransformer:
    return SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu")


# ------------------------------------------------------------------------------------------------------------- its face

ALONE = """
import json, sys
import core, models, predict, train
sys.path.append("somewhere/bundle")
from im2emb import load
z_BE = load().embed(json.load(open("paths.json")))
assert [m.MINE for m in (core, models, predict, train)] == [1, 2, 3, 4]
from models import inner
print(json.dumps(z_BE.tolist()))
"""


@pytest.mark.slow
def test_bundle_does_not_collide_with_packages_of_the_same_names(
    bundle: Path, paths: list[str], expected: torch.Tensor, tmp_path: Path
) -> None:
    """A program that has its own `models`, `train`, `predict` and `conf`, in a process without this project."""
    for number, name in enumerate(("core", "models", "predict", "train"), 1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {number}\n")
    (tmp_path / "models/inner.py").touch()
    shutil.copytree(bundle, tmp_path / "somewhere/bundle")
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    (tmp_path / "program.py").write_text(ALONE)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(site.getsitepackages()),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "program.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5, rtol=0)


def test_embed_accepts_every_image_type(library: ModuleType, bundle: Path, paths: list[str]) -> None:
    found = library.load(bundle, "cpu")
    first = found.embed(paths)
    opened = [Image.open(path) for path in paths]
    kinds: list[list[Any]] = [
        [Path(path) for path in paths],
        opened,
        [np.array(image) for image in opened],
        [decode(Path(path).read_bytes()) for path in paths],
    ]
    for images in kinds:
        torch.testing.assert_close(found.embed(images), first, atol=1e-6, rtol=0)
    many = found.embed(paths * 12)
    torch.testing.assert_close(many, first.repeat(12, 1), atol=1e-6, rtol=0)


def test_program_is_loaded_under_a_private_module_name(library: ModuleType, bundle: Path) -> None:
    library.load(bundle, "cpu")
    before = set(sys.modules)
    library.load(bundle, "cpu")
    assert set(sys.modules) == before
    assert [name for name in before if name.startswith("_im2emb_")]
    assert not {"predict", "im2emb"} & before


def test_folder_without_bundle_is_refused(library: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no bundle at {tmp_path}: it has no predict.py"):
        library.load(tmp_path)
    (tmp_path / "predict.py").write_text("def nonsense(:")
    for _ in range(2):  # what failed is not kept
        with pytest.raises(SyntaxError):
            library.load(tmp_path)


# ------------------------------------------------------------------------------------------------ sentence-transformers


def test_sentence_transformers_gives_the_same_vectors(
    transformer: SentenceTransformer, library: ModuleType, bundle: Path, paths: list[str], expected: torch.Tensor
) -> None:
    z_BE = library.load(bundle, "cpu").embed(paths).numpy()
    np.testing.assert_allclose(z_BE, expected, atol=1e-5)
    kinds: list[list[Any]] = [
        [Path(path) for path in paths],
        paths,
        [Image.open(path) for path in paths],
        [{"image": Image.open(path)} for path in paths],
        [np.array(Image.open(path)) for path in paths],
    ]
    for images in kinds:
        found_BE = transformer.encode(images, batch_size=4)
        assert found_BE.dtype == np.float32
        np.testing.assert_allclose(found_BE, z_BE, atol=1e-6)
    one_E = transformer.encode(paths[3])
    np.testing.assert_allclose(one_E, z_BE[3], atol=1e-6)
    tensor_BE = transformer.encode(paths, convert_to_tensor=True)
    assert tensor_BE.device == transformer.device
    assert transformer.encode([]).shape == (0,)
    assert transformer.get_embedding_dimension() == E


def test_progress_bar_counts_batches(
    transformer: SentenceTransformer, paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    transformer.encode(paths, batch_size=2, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    transformer.encode(paths, batch_size=2, show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_texts_go_through_the_text_encoder(transformer: SentenceTransformer, paths: list[str]) -> None:
    """Those of the index that images are to land in; and each text is nearest to its own image."""
    texts = ["a red rose", "the blue sky", "a starless night", "word " * 400]
    plain = SentenceTransformer(str(minilm_wheel()), device="cpu")
    text_TE = plain.encode(texts)
    np.testing.assert_allclose(transformer.encode(texts), text_TE, atol=1e-6)
    image_BE = transformer.encode(paths)
    cosine_TB = plain.similarity(text_TE, image_BE)
    assert cosine_TB.equal(transformer.similarity(text_TE, image_BE))
    assert [Path(paths[i]).stem for i in cosine_TB[:3].argmax(1).tolist()] == texts[:3]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["{folder}/gone.png"], r"(?s)1 images cannot be read.*gone\.png: .*No such file"),
        (["a text", "{folder}/a red rose.png"], "mixes multiple modalities"),
        (["a text", Path("a red rose.png")], "mixes images and texts, such as 'a text'; encode them separately"),
        ([np.zeros(9, np.float32)], "'audio' is not supported .* Supported modalities: image, text"),
    ],
)
def test_unsupported_inputs_are_refused(
    inputs: list[Any], words: str, transformer: SentenceTransformer, images: Path
) -> None:
    given = [item.format(folder=images) if isinstance(item, str) else item for item in inputs]
    with pytest.raises(ValueError, match=words):
        transformer.encode(given)


def test_loading_requires_trust_remote_code(bundle: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(bundle))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_kwargs": {"dtype": "int3"}}, "a bundle accepts `dtype`"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "a bundle accepts `dtype`"),
        ({"backend": "onnx"}, "has no onnx model; export the bundle with 'runtimes="),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], words: str, bundle: Path) -> None:
    with pytest.raises(ValueError, match=words):
        SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu", **options)


def test_model_kwargs_set_precision_and_text_encoder(bundle: Path, paths: list[str], expected: torch.Tensor) -> None:
    options = {"dtype": torch.bfloat16, "encoder": "/nowhere/at/all"}
    coarse = SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu", model_kwargs=options)
    cosine_B = (coarse.encode(paths, convert_to_tensor=True) * expected).sum(1)
    assert 1e-7 < (1 - cosine_B).max() < 1e-2
    with pytest.raises(ValueError, match=rf"(?s)the text encoder {MINILM} cannot be loaded: .*Name its folder"):
        coarse.encode("a text")


@pytest.mark.slow
def test_ensemble_bundle_loads_from_the_hub_cache_and_saves(
    learned: Path, library: ModuleType, paths: list[str], tmp_path: Path
) -> None:
    """As huggingface_hub lays a repository out on disk; no network."""
    members = [Member("plain", learned, 0.7), Member("views", learned, 0.3, flip=True, sizes=(32, 48))]
    write_ensemble(tmp_path / "ensemble", members, {})
    commit, repo = "c0ffee" * 6 + "c0de", tmp_path / "cache/models--some--one"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    bundle = repo / "snapshots" / commit
    export(tmp_path / "ensemble", bundle)
    (repo / "blobs").mkdir()
    for number, path in enumerate(path for path in bundle.rglob("*") if path.is_file()):
        path.replace(repo / f"blobs/{number}")
        path.symlink_to(repo / f"blobs/{number}")
    script = "import sys; sys.path.append(sys.argv[1]); from im2emb import load; load()"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(site.getsitepackages())}
    subprocess.run([sys.executable, "-S", "-c", script, bundle], cwd=tmp_path, env=environment, check=True)
    expected = load_ensemble(tmp_path / "ensemble").embed([decode(Path(path).read_bytes()) for path in paths])
    torch.testing.assert_close(library.load(bundle, "cpu").embed(paths), expected, atol=1e-5, rtol=0)
    options: dict[str, Any] = {"trust_remote_code": True, "device": "cpu"}
    fetched = SentenceTransformer("some/one", cache_folder=str(tmp_path / "cache"), **options)
    np.testing.assert_allclose(fetched.encode(paths), expected, atol=1e-5)
    fetched.save_pretrained(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), **options)
    assert contents(tmp_path / "saved").keys() == contents(bundle).keys()
    np.testing.assert_array_equal(saved.encode(paths), fetched.encode(paths))


@pytest.mark.slow
def test_onnx_backend_in_sentence_transformers(
    bundle: Path, paths: list[str], expected: torch.Tensor, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    shutil.copytree(bundle, tmp_path / "bundle")
    config = read_config(bundle)
    images = [decode(Path(path).read_bytes()) for path in paths]
    config["graphs"] = runtimes.write_runtimes(tmp_path / "bundle", network(bundle, config), ["onnx"], images)
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    by_onnx = SentenceTransformer(str(tmp_path / "bundle"), trust_remote_code=True, device="cpu", backend="onnx")
    np.testing.assert_allclose(by_onnx.encode(paths), expected, atol=1e-5)


def test_deepcopy_loads_the_bundle_again(transformer: SentenceTransformer, paths: list[str]) -> None:
    again = copy.deepcopy(transformer)
    np.testing.assert_array_equal(again.encode(paths), transformer.encode(paths))


@pytest.mark.slow
def test_multi_process_encoding(transformer: SentenceTransformer, paths: list[str]) -> None:
    alone = transformer.encode(paths)
    np.testing.assert_allclose(transformer.encode(paths, device=["cpu", "cpu"], chunk_size=2), alone, atol=1e-6)


def test_config_files_equal_those_of_sentence_transformers(
    bundle: Path, transformer: SentenceTransformer, tmp_path: Path
) -> None:
    transformer.save_pretrained(str(tmp_path / "saved"))
    (module,) = json.loads((bundle / "modules.json").read_text())
    assert json.loads((tmp_path / "saved/modules.json").read_text()) == [module]
    theirs = json.loads((tmp_path / "saved/config_sentence_transformers.json").read_text())
    model = json.loads((bundle / "config_sentence_transformers.json").read_text())
    assert (theirs["model_type"], theirs["similarity_fn_name"]) == (model["model_type"], model["similarity_fn_name"])


# --------------------------------------------------------------------------------------------------------------- README


def test_documented_search_finds_images_by_text(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of README and of docs/export.md, where the hub's name of MiniLM is a folder of these very weights."""
    readme = re.search(r"^\*\*5\. Search.*?(?=^## )", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    page = re.search(r"^## Search$.*?(?=^## |\Z)", (ROOT / "docs/export.md").read_text(), re.DOTALL | re.MULTILINE)
    assert readme is not None
    assert page is not None
    blocks = re.findall(r"```python\n(.*?)```", readme[0] + page[0], re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copytree(images, tmp_path / "photos")
    (tmp_path / MINILM).symlink_to(minilm_wheel() or "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "search", "exec"), names)
    finally:
        sys.modules.pop("im2emb", None)
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first.endswith("a red rose.png")
    assert len(others) == 4
    assert last.endswith("the blue sky.png")
