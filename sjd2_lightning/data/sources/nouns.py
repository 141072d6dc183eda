"""The objects of the scenes: which Twemoji pictures are things, and how a sentence calls them.

One picture an object: of near duplicates (skin tones, genders, two views of a car) the plainest stands for
all. Left out are pictures that no noun of an everyday sentence names (faces with a mood, gestures, signs,
flags, buttons, arrows, clock times) and those that show several things, or a thing in pieces far apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sjd2_lightning.data.sources.emoji import load_emoji_index

# name of the picture [= noun [/ plural]], where the noun is another word or its plural is not regular
_ANIMALS = """
mouse / mice, cow, tiger, leopard, rabbit, black cat, cat, dragon, crocodile, whale, snail, snake, horse,
goat, ewe = sheep / sheep, monkey, rooster, dog, pig, boar, elephant, octopus, spiral shell = shell,
bug = caterpillar, ant, honeybee = bee, lady beetle = ladybug, fish / fish, tropical fish / tropical fish,
blowfish / blowfish, turtle, hatching chick, baby chick = chick, bird, penguin, koala, poodle, camel,
dolphin, cow face, tiger face, rabbit face, pig face, horse face, dog face, cat face, mouse face, frog,
hamster, wolf / wolves, bear, polar bear, panda, chipmunk, lion, crab, scorpion, turkey, unicorn, eagle,
duck, bat, shark, owl, fox, butterfly, deer / deer, gorilla, lizard, rhinoceros = rhino, shrimp,
squid / squid, giraffe, zebra, hedgehog, sauropod = dinosaur, kangaroo, llama, peacock,
hippopotamus = hippo, parrot, raccoon, lobster, badger, swan, mammoth, dodo, sloth, otter, orangutan, skunk,
flamingo, oyster, beaver, bison / bison, seal, worm, beetle, spider, jellyfish / jellyfish, goose / geese,
moose / moose, donkey
"""
_PLANTS = """
evergreen tree = fir tree, deciduous tree = tree, palm tree, cactus / cacti, tulip, cherry blossom, rose,
hibiscus = hibiscus flower, sunflower, four leaf clover, maple leaf / maple leaves, seedling, potted plant,
lotus = lotus flower, bouquet, mushroom
"""
_FOOD = """
hot dog, taco, burrito, chestnut, hot pepper = chili pepper, ear of corn, tomato / tomatoes, eggplant,
grapes = bunch of grapes, melon, watermelon = slice of watermelon, tangerine, lime, lemon, banana,
pineapple, red apple = apple, green apple, pear, peach, strawberry, hamburger, pizza = slice of pizza,
poultry leg = chicken leg, rice ball, bread = slice of bread, soft ice cream = ice cream cone, doughnut,
cookie, chocolate bar, lollipop, custard, honey pot, shortcake = slice of cake, wine glass, cocktail glass,
beer mug, baby bottle, popcorn = box of popcorn, birthday cake, croissant, avocado, cucumber,
potato / potatoes, carrot, baguette bread = baguette, egg, pancakes = stack of pancakes, dumpling,
fortune cookie, coconut, broccoli = head of broccoli, pie, pretzel, sandwich, mango / mangoes, bagel,
cheese wedge = piece of cheese, cupcake, salt = salt shaker, garlic = garlic bulb, onion, waffle,
bell pepper, olive, teapot, jar, pea pod, kiwi fruit = kiwi, hot beverage = cup of coffee,
canned food = tin can, takeout box, bubble tea, beverage box = juice box
"""
_CLOTHES = """
graduation cap, top hat, crown, glasses = pair of glasses, sunglasses = pair of sunglasses, necktie = tie,
t-shirt, running shirt, jeans = pair of jeans, dress, handbag, purse, backpack, running shoe,
high-heeled shoe, man’s shoe = shoe, woman’s boot = boot, woman’s hat = hat, ring, billed cap = cap,
scarf / scarves, coat, shorts = pair of shorts, goggles = pair of goggles, lab coat, hiking boot, flat shoe,
military helmet = helmet, boxing glove, roller skate, ice skate, watch
"""
_HOUSEHOLD = """
umbrella, closed umbrella, thermometer, balloon, wrapped gift = present, jack-o-lantern = pumpkin,
Christmas tree, red paper lantern = lantern, amphora = vase, light bulb, seat, door, toilet, bathtub, bed,
chair, mirror, window, bucket, toothbrush, plunger, broom, basket, soap = bar of soap, sponge, razor,
candle, teddy bear, lipstick, kitchen knife / kitchen knives, spoon, key, old key, locked = padlock, bell,
alarm clock, mantelpiece clock, hourglass not done = hourglass, shopping cart, luggage = suitcase,
framed picture, wastebasket, safety pin, thread = spool of thread, yarn = ball of yarn,
scissors = pair of scissors, ladder, treasure chest, coffin, headstone
"""
_TOOLS = """
wrench, hammer, axe, carpentry saw = saw, screwdriver, shovel, toolbox, brick, magnet, fire extinguisher,
compass, abacus, clamp, gear, anchor, dagger, shield, bow and arrow / bows and arrows, bomb, microscope,
telescope, test tube, syringe, pill, stethoscope, crutch, flashlight, battery, electric plug = plug,
magnifying glass tilted left = magnifying glass, straight ruler = ruler, pencil, pen, paintbrush, crayon,
pushpin, paperclip, scroll, closed book = red book, blue book, orange book, green book, notebook, calendar,
file folder = folder, briefcase, package = cardboard box, envelope, newspaper, postbox, mobile phone,
telephone, fax machine, megaphone, camera, video camera, movie camera, television, radio, laptop,
desktop computer = computer, printer, floppy disk, joystick, money bag, coin, crystal ball,
artist palette = palette, x-ray, fuel pump, water pistol
"""
_PLAY = """
microphone, saxophone, guitar, trumpet, violin, banjo, accordion, long drum = drum, harp, trombone,
musical note, basketball, soccer ball, baseball, volleyball, american football = American football,
rugby football = rugby ball, tennis = tennis ball, pool 8 ball = billiard ball, bullseye = target,
game die = die / dice, trophy, military medal = medal, kite, parachute, boomerang, magic wand, puzzle piece,
yo-yo, skateboard, sled, circus tent, tent, clapper board, fishing pole, headphone = pair of headphones
"""
_TRAVEL = """
bus, ambulance, fire engine, police car, taxi, automobile = car, delivery truck = truck, tractor, bicycle,
motorcycle, racing car, kick scooter, motor scooter, pickup truck, tram car, locomotive, rocket, helicopter,
airplane, small airplane = propeller plane, flying saucer, sailboat, ferry, canoe, satellite,
vertical traffic light = traffic light, ring buoy, wheel, oil drum, house, castle, factory, hospital,
church, hut, fountain, Tokyo tower = tower, mountain, volcano / volcanoes, moai = stone head
"""
_BODY_SKY = """
bone, tooth / teeth, brain, ear, eye, nose, mouth, lungs = pair of lungs, robot, ghost, alien,
alien monster, skull, clown face, goblin, snowman without snow = snowman / snowmen, astronaut, firefighter,
police officer, ninja, farmer, baby, zombie, snowflake, star, glowing star, crescent moon, full moon, sun,
sun with face, cloud, rainbow, fire = flame, droplet, high voltage = lightning bolt, comet,
ringed planet = planet, globe showing Americas = globe, gem stone = diamond, red heart, blue heart,
green heart, yellow heart, purple heart, orange heart, broken heart, feather, wood = log, rock
"""

# nouns of a scene set that has few: all in training, and told apart by shape or colour; the first ones first
EVERYDAY = tuple(
    noun.strip()
    for noun in """
dog, key, apple, car, house, tree, fish, bird, guitar, banana, rose, hat, frog, pig, rabbit, penguin,
balloon, bus, rocket, crown, sun with face, candle, soccer ball, mushroom, carrot, duck, butterfly, elephant,
snowman, lemon, strawberry, sailboat, ladybug, cactus, pumpkin, robot, boot, hammer, turtle, doughnut,
panda, diamond, truck, owl, sunflower, trumpet, whale, cupcake, basketball, ghost, pineapple, crab, horse,
t-shirt, chair, bee, teapot, light bulb, bicycle, tomato, fox, cow, present, kite
""".replace("\n", " ").split(",")
)


@dataclass(frozen=True)
class SceneObject:
    """A thing that scenes show.

    Args:
        noun: what a caption calls one of it.
        plural: what a caption calls several.
        trained: whether training shows it; the others are names that the emoji data hold out.
        path: its picture.
    """

    noun: str
    plural: str
    trained: bool
    path: Path


def plural_of(noun: str) -> str:
    """The regular plural of a noun, of "pair of gloves" that of "pair"."""
    head, of, rest = noun.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + of + rest


@lru_cache(maxsize=1)
def load_objects() -> tuple[SceneObject, ...]:
    """All objects, sorted by noun; the same on every machine."""
    by_caption = {item.caption: item for item in load_emoji_index()}
    objects: dict[str, SceneObject] = {}
    groups = (_ANIMALS, _PLANTS, _FOOD, _CLOTHES, _HOUSEHOLD, _TOOLS, _PLAY, _TRAVEL, _BODY_SKY)
    for entry in ",".join(groups).replace("\n", " ").split(","):
        names, _, plural = (part.strip() for part in entry.partition("/"))
        caption, _, noun = (part.strip() for part in names.partition("="))
        noun = noun or caption
        item = by_caption[caption]
        objects[noun] = SceneObject(noun, plural or plural_of(noun), item.split == "train", item.path)
    return tuple(objects[noun] for noun in sorted(objects))
