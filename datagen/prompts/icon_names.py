"""The objects that scenes are made of: one icon of the Material Design Icons font each, with its English names.

A line reads `icon: name` and may go on with `/ plural` where the rule of `plural` fails, and `= other, names` for what
prompts say now and then or, behind a `~`, only `grammar.parse` takes. Chosen by eye: concrete things that differ as
images; of icons that look alike, one stays.
"""

from functools import cache
from typing import NamedTuple

_NAMES = """
# animals
bat: bat
bee: bee = bumblebee, honeybee
bird: bird = songbird
bug: beetle = ~bug
butterfly: butterfly
cat: cat = kitten, kitty
cow: cow = ~cattle
dog_side: dog = ~hound, french bulldog, bulldog
dolphin: dolphin
donkey: donkey = mule
duck: duck = duckling
elephant: elephant
fish: fish / fish = goldfish
horse_variant: horse = stallion, mare
jellyfish: jellyfish / jellyfish
kangaroo: kangaroo
koala: koala
ladybug: ladybird = ladybug
owl: owl
panda: panda
penguin: penguin
pig_variant: pig = boar
rabbit: rabbit = bunny, hare
rodent: mouse / mice = rat, rodent
shark: shark
sheep: sheep / sheep = lamb
snail: snail
snake: snake = serpent, cobra
spider_thread: spider
tortoise: tortoise
turkey: turkey
turtle: turtle = sea turtle
unicorn: unicorn
google_downasaur: dinosaur = ~t rex, tyrannosaurus, ultrasaurus
shark_fin: shark fin
paw: paw print
bone: bone
feather: feather = plume
bacteria: bacterium / bacteria = microbe
virus: virus
spider_web: cobweb = spider web
egg: egg
egg_easter: easter egg
fishbowl: fishbowl = fish tank
beehive_outline: beehive
horseshoe: horseshoe
horse_human: horse rider = equestrian
# plants
cactus: cactus / cacti
clover: clover
flower: flower = ~blossom, daisy
flower_tulip: tulip
flower_poppy: poppy
flower_pollen: sunflower
forest: grove of pines / groves of pines
grass: tuft of grass / tufts of grass
leaf: leaf / leaves
leaf_maple: maple leaf / maple leaves
mushroom: mushroom = toadstool
palm_tree: palm tree = ~palm
pine_tree: pine tree = fir tree, christmas tree
sprout: seedling = sprout
tree: tree = oak
spa: lotus / lotuses = lotus flower, water lily
barley: ear of wheat / ears of wheat = ~wheat, ~barley
hops: hop cone
corn: corn cob = ~corn, ~maize
cannabis: cannabis leaf / cannabis leaves = hemp leaf
# food
food_apple: apple
baguette: baguette
bread_slice: slice of bread / slices of bread = ~bread, ~toast
food_croissant: croissant
cake_variant: birthday cake = cake
cake_layered: layer cake = wedding cake
candy: candy / candies = ~sweet, bonbon
candycane: candy cane
carrot: carrot
cheese: cheese wedge = ~cheese
chili_hot: chilli pepper = chili, hot pepper
cookie: cookie = biscuit
cupcake: cupcake
food_drumstick: chicken leg = drumstick
egg_fried: fried egg
french_fries: portion of french fries / portions of french fries = ~french fries, ~fries, ~chips
fruit_cherries: pair of cherries / pairs of cherries = ~cherry, ~cherries
fruit_citrus: lemon
fruit_grapes: bunch of grapes / bunches of grapes = ~grapes, ~grape
fruit_pear: pear
fruit_pineapple: pineapple
fruit_watermelon: slice of watermelon / slices of watermelon = ~watermelon
hamburger: hamburger = burger, cheeseburger
food_hot_dog: hot dog
ice_cream: ice cream cone = ice cream, gelato
ice_pop: ice lolly / ice lollies = popsicle, ice pop
noodles: bowl of noodles / bowls of noodles = ~noodles, ~ramen, ~spaghetti
pasta: plate of pasta / plates of pasta = ~pasta
peanut: peanut
pizza: pizza
popcorn: bucket of popcorn / buckets of popcorn = ~popcorn
pretzel: pretzel
pumpkin: pumpkin
halloween: jack o lantern
sausage: sausage
food_steak: steak
food_turkey: roast turkey
taco: taco = burrito
# drink and kitchen
beer: pint of beer / pints of beer = ~beer, glass of beer
bottle_wine: wine bottle = bottle of wine
bottle_tonic_skull: poison bottle = bottle of poison
bottle_tonic_plus: medicine bottle = ~potion
coffee: cup of coffee / cups of coffee = ~coffee, coffee cup, teacup
coffee_maker: coffee machine
cup_water: glass of water / glasses of water = tumbler
glass_cocktail: cocktail glass / cocktail glasses = cocktail, martini
glass_flute: champagne flute = ~champagne
glass_wine: wine glass / wine glasses = wineglass, ~glass of wine
tea: mug of tea / mugs of tea = ~tea, cup of tea
kettle: kettle = teapot
kettle_pour_over: gooseneck kettle
keg: keg
barrel: barrel = cask
pot_steam: cooking pot = ~pot, saucepan
grill: barbecue = grill
toaster: toaster
microwave: microwave oven = microwave
fridge: fridge = refrigerator
stove: stove = oven
blender: blender
bowl_mix: mixing bowl
shaker: salt shaker
chef_hat: chef's hat
knife: knife / knives
silverware_fork_knife: knife and fork / knives and forks = ~cutlery
silverware_spoon: spoon
silverware_fork: fork
mortar_pestle: mortar and pestle / mortars and pestles
soy_sauce: soy sauce bottle
baby_bottle: baby bottle
liquor: bottle and glass / bottles and glasses = ~whisky
countertop: kitchen sink = ~sink
# vehicles
airplane: airplane = aeroplane, plane, ~jet
airballoon: hot air balloon = air balloon, ~balloon ride
ambulance: ambulance
bicycle: bicycle = bike
bicycle_penny_farthing: penny farthing
bicycle_cargo: cargo bike
bulldozer: bulldozer
bus: bus / buses
bus_double_decker: double decker bus / double decker buses
bus_school: school bus / school buses
car_side: car = automobile, sedan
car_convertible: convertible
car_sports: sports car = ~ferrari
car_limousine: limousine = limo
caravan: caravan = camper
dump_truck: dump truck = dumper
excavator: excavator = digger
ferry: ferry / ferries = ~ship, steamboat
fire_truck: fire engine = fire truck
forklift: forklift
go_kart: go kart
golf_cart: golf cart
gondola: cable car
helicopter: helicopter = ~chopper
kayaking: kayaker = kayak
moped: moped
motorbike: motorbike = motorcycle
rickshaw: rickshaw
rocket: rocket = spaceship, spacecraft
rv_truck: motorhome
sail_boat: sailboat = sailing boat, boat, yacht
satellite_variant: satellite
scooter: kick scooter = scooter
snowmobile: snowmobile
space_station: space station
submarine: submarine
tanker_truck: tanker truck
taxi: taxi = ~cab
tow_truck: tow truck
tractor: tractor
train: train = locomotive
train_car_caboose: caboose
tram: tram = streetcar
truck: truck = lorry
truck_flatbed: flatbed truck
truck_cargo_container: container lorry / container lorries
ufo_outline: flying saucer = ufo
van_utility: delivery van
wheelchair: wheelchair
wheel_barrow: wheelbarrow
cart: shopping trolley = shopping cart
baby_carriage: baby carriage = baby buggy, stroller
jeepney: jeepney
bicycle_basket: bicycle with a basket / bicycles with baskets
parachute: parachute
paragliding: paraglider
quadcopter: quadcopter
tank: tank
ship_wheel: ship's wheel / ship's wheels = helm
anchor: anchor
steering: steering wheel
tire: tyre = tire
engine: engine
gas_station: petrol pump = gas pump
traffic_light: traffic light
traffic_cone: traffic cone
# buildings and places one can point at
barn: barn
bank: bank = greek temple
bridge: bridge
bus_stop_covered: bus shelter
castle: castle = fortress
church: church / churches = chapel, cathedral
eiffel_tower: eiffel tower
factory: factory / factories
ferris_wheel: ferris wheel
fountain: fountain
garage: garage
greenhouse: greenhouse
home: house = home, cottage
hospital_building: hospital
lighthouse: lighthouse
mosque: mosque
office_building: office block = skyscraper, office building
oil_lamp: oil lamp = genie lamp, magic lamp
pier_crane: harbour crane
pyramid: pyramid
silo: silo
stadium_variant: stadium
storefront: shop = ~store, market stall
synagogue: synagogue
temple_buddhist: pagoda = buddhist temple
temple_hindu: hindu temple
tent: tent
tower_fire: watchtower
town_hall: town hall
transmission_tower: electricity pylon = pylon
tunnel: railway tunnel = tunnel
warehouse: warehouse
water_well: water well = wishing well
wind_turbine: wind turbine = windmill
windsock: windsock
yurt: yurt
fence: picket fence = fence
wall: brick wall
billboard: billboard
mailbox: mailbox / mailboxes = ~letterbox
post_lamp: street lamp = lamp post, lamppost
fire_hydrant: fire hydrant = hydrant
grave_stone: gravestone = tombstone
coffin: coffin
radio_tower: radio tower
satellite_uplink: satellite dish / satellite dishes
slide: playground slide
seesaw: seesaw
boom_gate: level crossing barrier
escalator: escalator
stairs: staircase = ~stairs
solar_power_variant: solar panel
# home
alarm: alarm clock
bathtub: bathtub = ~bath
bed: bed
bunk_bed: bunk bed
bookshelf: bookshelf / bookshelves = bookcase
broom: broom = broomstick
bucket: bucket = pail
candle: candle
candelabra_fire: candelabra
ceiling_fan: ceiling fan
ceiling_light: ceiling lamp
chandelier: chandelier
chair_rolling: office chair
chair_school: school chair
clock: clock
coat_rack: coat rack
curtains: pair of curtains / pairs of curtains = ~curtains
desk: desk
desk_lamp: desk lamp
door: door
dresser: chest of drawers / chests of drawers = dresser
faucet: tap = faucet
fan: fan
fireplace: fireplace
floor_lamp: floor lamp = ~lamp
hair_dryer: hair dryer
hanger: coat hanger
iron: flat iron
lava_lamp: lava lamp
lightbulb: light bulb = lightbulb
lightbulb_cfl_spiral: spiral bulb
mirror: mirror
paper_roll: toilet roll
rug: rug = carpet
safe: safe
seat: armchair = ~chair
shower_head: shower head
sofa: sofa = couch
stool: stool
table_furniture: table
toilet: toilet
toothbrush: toothbrush / toothbrushes
toothbrush_paste: toothpaste tube
trash_can: rubbish bin = trash can, dustbin
umbrella: umbrella
umbrella_closed: closed umbrella
vacuum: vacuum cleaner
wardrobe: wardrobe
washing_machine: washing machine
watering_can: watering can
window_open_variant: window
spray_bottle: spray bottle
lotion: lotion bottle
lipstick: lipstick
razor_double_edge: razor blade
basket: basket
key: key
key_chain: keyring
lock: padlock = lock
mower: lawn mower
coach_lamp: coach lamp
radiator: radiator
squeegee: squeegee
baby_face_outline: baby face = ~baby
string_lights: string of fairy lights / strings of fairy lights = ~fairy lights
ornament: bauble = christmas ornament
gift: gift = ~present, gift box
party_popper: party popper
balloon: balloon
stocking: christmas stocking
teddy_bear: teddy bear = ~bear
toy_brick: toy brick = ~lego brick
tangram: tangram
puzzle: jigsaw piece = puzzle piece
# tools
anvil: anvil
axe: axe
axe_battle: battle axe
binoculars: pair of binoculars / pairs of binoculars = ~binoculars
brush: paintbrush / paintbrushes = paint brush
circular_saw: circular saw
compass: compass / compasses
compass_rose: compass rose
crane: tower crane = crane
fire_extinguisher: fire extinguisher
flashlight: torch / torches = flashlight
gavel: gavel
cog: gear wheel = cog, ~gear
hammer: hammer
hammer_wrench: hammer and wrench / hammers and wrenches
hand_saw: handsaw
hook: hook
ladder: ladder
magnet: magnet
magnify: magnifying glass / magnifying glasses
math_compass: drawing compass / drawing compasses
nut: hexagon nut
pickaxe: pickaxe
pitchfork: pitchfork = trident
pliers: pair of pliers / pairs of pliers = ~pliers
rake: rake
ruler: ruler
ruler_square: set square
saw_blade: saw blade
scale_balance: pair of scales / pairs of scales = ~scales
content_cut: pair of scissors / pairs of scissors = ~scissors
screw_flat_top: screw
screwdriver: screwdriver
shovel: shovel = ~spade
sickle: sickle = scythe
soldering_iron: soldering iron
spray: spray can
stamper: rubber stamp
tape_measure: tape measure
toolbox: toolbox / toolboxes
wrench: wrench / wrenches = spanner
paperclip: paperclip
pencil: pencil
fountain_pen_tip: fountain pen nib = nib
eyedropper: eyedropper = pipette
needle: syringe = ~needle
palette: paint palette = palette
format_paint: paint roller
carabiner: carabiner
lasso: lasso
# weapons and adventure
bow_arrow: bow and arrow / bows and arrows = ~archer
bomb: bomb
bullet: bullet
boomerang: boomerang
crystal_ball: crystal ball
crown: crown
dice_5: die / dice
dice_d20: twenty sided die / twenty sided dice
ghost: ghost = ~spirit, phantom
magic_staff: magic staff = wizard staff
alien: alien = extraterrestrial
ninja: ninja
pirate: pirate
pistol: pistol = gun
police_badge: sheriff's badge = sheriff badge
robber: robber = burglar
robot: robot = android
robot_industrial: robot arm
script_text: parchment scroll = scroll
shield: shield
shuriken: throwing star = shuriken
skull: skull
skull_crossbones: skull and crossbones / skulls and crossbones
spear: spear
sword: sword
sword_cross: pair of crossed swords / pairs of crossed swords = ~crossed swords
treasure_chest: treasure chest
wizard_hat: wizard hat = witch hat
diamond_stone: diamond = gem, jewel
ring: diamond ring = ring
knife_military: dagger
mine: naval mine
campfire: campfire = bonfire
fire: flame = fire
guy_fawkes_mask: moustached mask
drama_masks: pair of theatre masks / pairs of theatre masks = ~theatre masks
domino_mask: domino mask = mask
handcuffs: pair of handcuffs / pairs of handcuffs = ~handcuffs
map: folded map = map
snowman: snowman / snowmen
chess_king: chess king
chess_queen: chess queen
chess_bishop: chess bishop
chess_knight: chess knight
chess_rook: chess rook
chess_pawn: chess pawn
cards_playing_spade: ace of spades / aces of spades
cards_club: club symbol
poker_chip: poker chip
slot_machine: slot machine
space_invaders: space invader
# music and media
bugle: bugle = trumpet horn
trumpet: trumpet
guitar_acoustic: acoustic guitar = guitar
guitar_electric: electric guitar
guitar_pick: guitar pick
piano: piano = piano keyboard
saxophone: saxophone
violin: violin = cello, fiddle
ocarina: ocarina
metronome: metronome
microphone: microphone
microphone_variant: stage microphone
music_clef_treble: treble clef
music_note: musical note = music note
headphones: pair of headphones / pairs of headphones = ~headphones
boombox: boombox / boomboxes
radio: radio
record_player: record player = turntable, gramophone
album: vinyl record
cassette: cassette tape = cassette
speaker: loudspeaker = speaker
amplifier: guitar amplifier
bullhorn: megaphone = bullhorn
camera: camera
video_vintage: film camera = movie camera
camcorder: camcorder
filmstrip: film strip
movie_open: clapperboard = clapper board
projector: projector
television_classic: old television = television, ~tv
cellphone: mobile phone = smartphone, cellphone
phone_classic: old telephone = telephone
laptop: laptop = ~computer
desktop_tower: computer tower
keyboard: computer keyboard = keyboard
mouse: computer mouse / computer mice
printer: printer
floppy: floppy disk
gamepad_variant: game controller = gamepad
typewriter: typewriter
calculator: calculator
abacus: abacus / abacuses
chip: microchip
robot_vacuum: robot vacuum cleaner
webcam: webcam
cctv: security camera
book_open_page_variant: open book
book: book = tome
book_cross: bible
bookmark: bookmark
newspaper: newspaper
email: envelope = ~letter
postage_stamp: postage stamp
notebook: notebook = diary
calendar: calendar
briefcase: briefcase
bag_suitcase: suitcase
bag_personal: backpack = rucksack
purse: purse
wallet: wallet
shopping: shopping bag
sack: sack = money bag
cash: banknote
gold: pile of gold bars / piles of gold bars = ~gold bars
hand_coin: hand with a coin / hands with coins
cash_register: cash register
barcode: barcode
ticket: ticket
passport: passport
tag: price tag
trophy: trophy / trophies = winner's cup
medal: medal
certificate: certificate
podium: winners' podium
flag: flag
flag_checkered: chequered flag
sign_direction: signpost
presentation: flip chart
lectern: lectern
# clothes
bow_tie: bow tie
tie: necktie = tie
hat_fedora: fedora = ~hat, top hat
hard_hat: hard hat
racing_helmet: racing helmet
football_helmet: american football helmet
account_cowboy_hat: cowboy = cowgirl
glasses: pair of glasses / pairs of glasses = ~spectacles, ~eyeglasses
sunglasses: pair of sunglasses / pairs of sunglasses = ~sunglasses
safety_goggles: pair of goggles / pairs of goggles = ~goggles
lingerie: bikini
mustache: moustache = mustache
necklace: necklace
shoe_heel: high heel = ~high heels
shoe_sneaker: trainer shoe = sneaker, shoe
shoe_ballet: ballet shoe
shoe_cleat: football boot = ~boot
roller_skate: roller skate
skate: ice skate
tshirt_crew: t shirt = tshirt, shirt
watch: wristwatch / wristwatches = watch
# body and people
arm_flex: flexed arm = ~muscular arm
brain: brain
ear_hearing: ear
eye: eye = eyeball
foot_print: footprint
hand_back_right: hand
hand_peace: peace sign hand
handshake: handshake
heart: heart
heart_broken: broken heart
lungs: pair of lungs / pairs of lungs = ~lungs
stomach: stomach
tooth: tooth / teeth
human_female_dance: dancing woman / dancing women = dancer, ballerina
human_male: man / men
human_female: woman / women
human_scooter: scooter rider
face_man: man's face / men's faces
face_woman: woman's face / women's faces
emoticon_happy: smiley face = smiley
emoticon_devil: devil face = devil, demon
emoticon_poop: pile of poo / piles of poo = ~poop
karate: karate fighter = martial artist
meditation: meditating monk = monk
gymnastics: gymnast
run: runner
hiking: hiker
ski: skier
snowboard: snowboarder
skateboarding: skateboarder
surfing: surfer
swim: swimmer
diving_scuba: scuba diver = diver
rowing: rower
weight_lifter: weightlifter
golf: golfer
dance_ballroom: dancing couple
kabaddi: wrestler
mother_nurse: nursing mother
beekeeper: beekeeper
account_tie: businessman in a tie / businessmen in ties = businessman
account_hard_hat: construction worker = builder
doctor: doctor
# sport
badminton: shuttlecock
baseball: baseball
baseball_bat: baseball bat
basketball: basketball
basketball_hoop: basketball hoop
billiards: billiard ball = eight ball
billiards_rack: rack of billiard balls / racks of billiard balls
bowling: bowling ball and pins / bowling balls and pins = bowling pin
boxing_glove: boxing glove
bullseye_arrow: archery target = bullseye
cricket: cricket bat
curling: curling stone
diving_flippers: diving fin
diving_helmet: diving helmet
diving_snorkel: snorkel and mask / snorkels and masks = ~snorkel
dumbbell: dumbbell
football: american football
golf_tee: golf ball
hockey_sticks: pair of hockey sticks / pairs of hockey sticks = ~hockey stick
hockey_puck: hockey puck
jump_rope: skipping rope
kettlebell: kettlebell
kite: kite
lifebuoy: lifebuoy = life ring
rugby: rugby ball
skateboard: skateboard
soccer: soccer ball
tennis: tennis racket
volleyball: volleyball
whistle: whistle
oar: oar
scoreboard: scoreboard
timer: stopwatch
timer_sand: hourglass / hourglasses
# science
atom: atom
battery: battery / batteries
dna: dna helix / dna helices = ~dna
flask: laboratory flask = flask, beaker
flask_round_bottom: round flask
test_tube: test tube
microscope: microscope
molecule: molecule
pill: pill
radioactive: radiation symbol
biohazard: biohazard symbol
stethoscope: stethoscope
telescope: telescope
thermometer: thermometer
bandage: sticking plaster = ~plaster
medical_bag: first aid kit
blood_bag: blood bag
iv_bag: drip bag
cube: cube
cone: cone
cylinder: cylinder
octahedron: octahedron
sphere: sphere
earth: globe = ~planet earth, ~planet
globe_model: desk globe
fingerprint: fingerprint
turbine: turbine
power_plug: power plug
power_socket_eu: wall socket
pipe_valve: pipe valve
water_pump: water pump
bell: bell
seal: rosette
# sky and weather
star: star
star_shooting: shooting star
star_david: star of david / stars of david
star_crescent: star and crescent / stars and crescents
moon_waning_crescent: crescent moon = moon
weather_sunny: sun
weather_lightning: thunder cloud = thundercloud, storm cloud
weather_pouring: rain cloud
weather_snowy_heavy: snow cloud
weather_tornado: tornado / tornadoes = whirlwind
weather_hurricane: cyclone = hurricane, ~vortex
weather_partly_cloudy: sun behind a cloud / suns behind clouds
cloud: cloud
snowflake: snowflake
lightning_bolt: lightning bolt
looks: rainbow
meteor: meteor shower = ~meteor, ~comet
volcano: erupting volcano / erupting volcanoes = volcano
waterfall: waterfall
tsunami: giant wave = tsunami
island: palm island = island
water: water drop = raindrop
firework: firework rocket
pillar: marble column = pillar, column
# signs and faith
cross_celtic: celtic cross / celtic crosses
cross: cross / crosses = crucifix
fleur_de_lis: fleur de lis / fleurs de lis
khanda: khanda
menorah_fire: menorah
om: om symbol
pentagram: pentagram
peace: peace symbol
triforce: stack of triangles / stacks of triangles
yin_yang: yin yang
infinity: infinity symbol
recycle: recycling symbol
# work
cigar: cigar
smoking_pipe: smoking pipe
gas_cylinder: gas cylinder
propane_tank: propane tank
dolly: sack truck
package_variant: cardboard box / cardboard boxes = ~box, parcel, package
food_takeout_box: noodle takeaway box / noodle takeaway boxes
oil: oil can
fuel: jerrycan = fuel can
hot_tub: hot tub
pool: swimming pool ladder
human_cane: old man with a cane / old men with canes
school: graduation cap
pine_tree_fire: burning pine / burning pines
alarm_light: emergency light = siren
hand_pointing_up: pointing hand = pointing finger
thumb_up: thumbs up hand = ~thumbs up
hands_pray: praying hands / praying hands
account_injury: injured person / injured people
"""


class Object(NamedTuple):
    name: str  # "chess queen"
    plural: str  # "chess queens"
    others: tuple[str, ...]  # synonyms that take an article and a plural
    read: tuple[str, ...]  # words that are understood, but not written: mass nouns, loose synonyms
    icon: str  # "chess_queen"


def plural(name: str) -> str:
    """The plural of a regular English noun; its last word is the noun."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


@cache
def objects() -> dict[str, Object]:
    """Name → object, in the order of the list above."""
    found = {}
    for line in _NAMES.strip().splitlines():
        if line.startswith("#"):
            continue
        icon, rest = line.split(": ")
        rest, _, others = rest.partition(" = ")
        name, _, many = rest.partition(" / ")
        synonyms = [word for word in others.split(", ") if word]
        said = tuple(word for word in synonyms if not word.startswith("~"))
        read = tuple(word[1:] for word in synonyms if word.startswith("~"))
        found[name] = Object(name, many or plural(name), said, read, icon)
    return found
