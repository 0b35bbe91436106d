// Page of train.demo: an image pasted or dropped anywhere replaces the current one and is explained.
() => {
  const shown = (selector) => document.querySelector(`#image ${selector}`);
  const put = async (file) => {
    shown("[aria-label='Remove Image']")?.click();
    for (let waited = 0; waited < 2000 && !shown("input[type=file]"); waited += 20) {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    const input = shown("input[type=file]");
    if (!input) return;
    const sent = new DataTransfer();
    sent.items.add(file);
    input.files = sent.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file) put(file);
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();  // else the browser would leave the page
    const file = event.dataTransfer.files[0];
    if (file && !event.target.closest("#image button")) put(file);  // there gradio takes it
  });
}
