#!/usr/bin/env python3
"""Rebuild the emoji of pituning's scenes from published npm packages.

Usage (Node.js, npm, Pillow and numpy are needed)::

    python scripts/build_emoji_atlas.py [--work FOLDER]

The packages are installed into the working folder (a temporary one by default) at the versions named below. Every
emoji is rendered at 256 pixels, cut to what is visible, and reduced so that its longer side has 64 pixels. Output, in
``src/pituning/data/emoji``: one lossless WebP sheet per style, cells of 64 × 64 pixels in rows of 16, each emoji in the
middle of its cell; and ``atlas.json`` with names, groups, boxes and colours.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "pituning" / "data" / "emoji"
CELL, COLUMNS, RENDERED = 64, 16, 256
SMALL_KNOWN, SMALL_NEW = 100, 25

STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
}
OTHERS = {"unicode-emoji-json": "0.9.0", "@resvg/resvg-js": "2.6.2"}

# Group → its emoji, the commonest first: the name, and in brackets the Unicode name (with hyphens) where it differs.
# Left out: what looks like another one at 20 pixels, what a shorter name of another one means as well (taxi and police
# car), and names without a singular.
GROUPS = {
    "animal": """
        dog, cat, horse, cow, pig, rabbit, monkey, elephant, lion, tiger, fox, bear, mouse, frog, duck, turtle, snake, fish,
        penguin, owl, bee [honeybee], butterfly, snail, crab, whale, dolphin, shark, octopus, spider, ladybug [lady-beetle],
        chick [baby-chick], rooster, eagle, parrot, flamingo, zebra, giraffe, camel [two-hump-camel], deer,
        sheep [ewe], kangaroo, koala, panda, hedgehog, bat, crocodile, dinosaur [t-rex], unicorn
    """,
    "plant": """
        rose, tree [deciduous-tree], cactus, tulip, sunflower, pine [evergreen-tree], palm [palm-tree], mushroom,
        maple leaf, clover [four-leaf-clover], potted plant, hibiscus, seedling
    """,
    "fruit": """
        apple [red-apple], banana, strawberry, grape [grapes], lemon, watermelon, cherry [cherries], pineapple, pear,
        peach, kiwi [kiwi-fruit], mango, coconut, tangerine, blueberry [blueberries]
    """,
    "vegetable": """
        carrot, tomato, corn [ear-of-corn], broccoli, eggplant, potato, onion, cucumber, pepper [bell-pepper],
        chili [hot-pepper], avocado, garlic
    """,
    "dish": """
        pizza, burger [hamburger], egg, sandwich, hot dog, taco, croissant, cheese [cheese-wedge], loaf [bread], pretzel,
        salad [green-salad], waffle, drumstick [poultry-leg], bagel, dumpling
    """,
    "sweet": """
        cookie, donut [doughnut], cake [birthday-cake], ice cream, lollipop, cupcake, candy, pie, chocolate bar
    """,
    "drink": """
        coffee [hot-beverage], milk [glass-of-milk], wine [wine-glass], beer [beer-mug], juice box [beverage-box], teapot,
        cocktail [cocktail-glass], soda [cup-with-straw], champagne [bottle-with-popping-cork], baby bottle
    """,
    "vehicle": """
        car [automobile], bus, train [locomotive], plane [airplane], bike [bicycle], truck [delivery-truck], ship, helicopter,
        rocket, tractor, sailboat, ambulance, motorbike [motorcycle], taxi, fire truck [fire-engine], scooter [motor-scooter],
        ufo [flying-saucer], canoe, wheelchair [manual-wheelchair]
    """,
    "building": """
        house, castle, church, tent, factory, school, temple [classical-building], hut, hospital, tower [tokyo-tower],
        stadium
    """,
    "garment": """
        shirt [t-shirt], dress, coat, glove [gloves], sock [socks], scarf, cap [billed-cap], top hat, shoe [running-shoe],
        boot [hiking-boot], kimono, backpack, handbag
    """,
    "tool": """
        hammer, axe, wrench, saw [carpentry-saw], screwdriver, knife [kitchen-knife], magnet, ladder, toolbox, gear, bow
        [bow-and-arrow], syringe
    """,
    "instrument": """
        guitar, drum, trumpet, violin, piano [musical-keyboard], saxophone, accordion, bell
    """,
    "toy": """
        soccer ball, basketball, teddy bear, kite, balloon, die [game-die], baseball, skateboard, puzzle piece, target
        [bullseye], football [american-football], roller skate, yo-yo, snowman
    """,
    "sky": """
        sun, moon [crescent-moon], cloud, star, rainbow, snowflake, lightning [high-voltage], planet [ringed-planet],
        tornado
    """,
    "household": """
        chair, bed, door, candle, umbrella, window, toilet, bathtub, bucket, broom, spoon, basket, light bulb, vase [amphora],
        toothbrush, shopping cart
    """,
    "device": """
        phone [mobile-phone], laptop, camera, television, radio, alarm clock, watch, microphone [studio-microphone], printer,
        telescope, battery, microscope
    """,
    "stationery": """
        book [open-book], pencil, envelope, paintbrush, crayon, ruler [straight-ruler], scroll, newspaper, briefcase,
        palette [artist-palette]
    """,
    "valuable": """
        crown, key, ring, trophy, diamond [gem-stone], gift [wrapped-gift], medal [sports-medal], coin, money bag, lock
        [locked]
    """,
}
PLURALS = {
    "mouse": "mice", "fish": "fish", "deer": "deer", "sheep": "sheep", "loaf": "loaves", "knife": "knives", "die": "dice",
    "maple leaf": "maple leaves", "tomato": "tomatoes", "potato": "potatoes", "octopus": "octopuses", "lightning": "lightnings",
}  # fmt: skip

RENDER = """
const { Resvg } = require('@resvg/resvg-js'); const fs = require('fs');
const [jobs, side] = [JSON.parse(fs.readFileSync('jobs.json')), SIDE];
for (const { file, svg } of jobs)
  fs.writeFileSync(file, new Resvg(svg, { fitTo: { mode: 'width', value: side } }).render().asPng());
""".replace("SIDE", str(RENDERED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the packages and the single pictures")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        install(work)
        emoji = chosen(work / "node_modules")
        build(emoji, render(emoji, work), arguments.output)


def install(work: Path) -> None:
    (work / "package.json").write_text("{}")
    wanted = [f"{p}@{v}" for p, v in (*STYLES.values(), *OTHERS.items())]
    subprocess.run(["npm", "install", "--no-fund", "--no-audit", *wanted], cwd=work, check=True)


def chosen(modules: Path) -> list[dict[str, Any]]:
    """The chosen emoji in their order, each with its character, group and membership."""
    unicode = json.loads((modules / "unicode-emoji-json" / "data-by-emoji.json").read_text())
    characters = {entry["slug"].replace("_", "-"): character for character, entry in unicode.items()}
    emoji = []
    for group, listed in GROUPS.items():
        for position, item in enumerate(" ".join(listed.split()).split(", ")):
            name, _, slug = item.rstrip("]").partition(" [")
            slug = slug or name.replace(" ", "-")
            if slug not in characters:
                raise SystemExit(f"{group}: there is no emoji {slug!r}")
            emoji.append(
                {"name": name, "plural": plural(name), "group": group, "emoji": characters[slug], "slug": slug,
                 "known": position % 5 != 4}
            )  # fmt: skip
    if twice := [n for n, count in Counter(e["name"] for e in emoji).items() if count > 1]:
        raise SystemExit(f"names that occur twice: {twice}")
    small = {
        e["name"] for known, count in ((True, SMALL_KNOWN), (False, SMALL_NEW)) for e in spread(emoji, known, count)
    }
    return [{**e, "small": e["name"] in small} for e in emoji]


def spread(emoji: list[dict[str, Any]], known: bool, count: int) -> list[dict[str, Any]]:
    """So many of the known or of the new ones: the first of every group, then the second of every group, and so on."""
    members = {g: [e for e in emoji if e["group"] == g and e["known"] == known] for g in GROUPS}
    longest = max(map(len, members.values()))
    ordered = [members[g][rank] for rank in range(longest) for g in GROUPS if rank < len(members[g])]
    return ordered[:count]


def plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    if name[-1] == "y" and name[-2] not in "aeou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def render(emoji: list[dict[str, Any]], work: Path) -> dict[tuple[str, str], Image.Image]:
    """Every emoji in every style, cut to what is visible; the longer side has 64 pixels."""
    jobs = []
    for style, (package, _) in STYLES.items():
        icons = json.loads((work / "node_modules" / package / "icons.json").read_text())
        for entry in emoji:
            slug = entry["slug"]
            slug = icons.get("aliases", {}).get(slug, {}).get("parent", slug)
            icon = icons["icons"][slug]
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
            jobs.append({"file": f"{style}-{entry['slug']}.png", "svg": svg})
    (work / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(["node", "-e", RENDER], cwd=work, check=True)
    return {
        (style, e["name"]): fitted(Image.open(work / f"{style}-{e['slug']}.png").convert("RGBA"))
        for style in STYLES
        for e in emoji
    }


def fitted(image: Image.Image) -> Image.Image:
    box = image.getchannel("A").point(lambda a: 255 * (a >= 40)).getbbox()
    cut = image.crop(box)
    scale = CELL / max(cut.size)
    size = tuple(max(1, round(s * scale)) for s in cut.size)
    return cut.resize(size, Image.Resampling.LANCZOS)


def build(emoji: list[dict[str, Any]], pictures: dict[tuple[str, str], Image.Image], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    rows = -(-len(emoji) // COLUMNS)
    entries = [{k: e[k] for k in ("name", "plural", "group", "emoji", "known", "small")} for e in emoji]
    for style in STYLES:
        sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
        for number, entry in enumerate(entries):
            picture = pictures[style, entry["name"]]
            x = number % COLUMNS * CELL + (CELL - picture.width) // 2
            y = number // COLUMNS * CELL + (CELL - picture.height) // 2
            sheet.paste(picture, (x, y))
            looks = {"box": [x, y, x + picture.width, y + picture.height], "colour": dominant_colour(picture)}
            entry.setdefault("styles", {})[style] = looks
        sheet.save(output / f"{style}.webp", lossless=True, quality=100, method=6, exact=False)
    sources = {style: f"{package} {version}" for style, (package, version) in STYLES.items()}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    head = json.dumps({"cell": CELL, "sources": sources})[:-1]
    (output / "atlas.json").write_text(f'{head}, "emoji": [\n{lines}\n]}}\n', encoding="utf-8")


def dominant_colour(picture: Image.Image) -> str:
    """The colour word of most of the picture; empty where none is unmistakable."""
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).reshape(-1, 4)
    words = Counter(colour_word(*map(int, p[:3])) for p in pixels if p[3] > 200)
    (first, count), *others = words.most_common()
    second = others[0][1] if others else 0
    total = sum(words.values())
    return first if count >= 0.6 * total and second <= 0.28 * total else ""


def colour_word(red: int, green: int, blue: int) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.3:
        return "black"
    if saturation < 0.17:
        return "white" if value > 0.86 else "grey" if value > 0.34 else "black"
    if 180 < hue < 260 and saturation < 0.4:  # slate
        return "grey" if saturation < 0.27 and value < 0.75 else ""
    if hue < 17 or hue >= 340:
        if saturation < 0.66:
            return "pink" if value > 0.82 and (hue >= 340 or hue < 8) else "brown" if hue < 17 and value < 0.8 else ""
        return "red" if value > 0.55 else "brown"
    if hue < 40:
        if value < 0.74:
            return "brown"
        return "orange" if saturation > 0.6 else ""
    if hue < 66:
        return "yellow" if value > 0.72 and saturation > 0.4 else "green" if hue > 50 and saturation > 0.4 else ""
    if hue < 165:
        return "green"
    if hue < 252:
        return "blue"
    if hue < 292:
        return "purple"
    return "pink" if value > 0.75 else "purple"


if __name__ == "__main__":
    main()
