"""Write benchmarks/data/lora_task.jsonl: orders in plain words, answered in one fixed terse form.

    python benchmarks/lora_task.py

The answers follow from the questions by rules that no base model knows: fields in a fixed order, items
sorted, numbers as digits, a total, and a flag for what breaks. The file is the same on every run.
"""

import json
import random
from pathlib import Path

FILE = Path(__file__).parent / "data" / "lora_task.jsonl"
COUNT = 320
NAMES = (
    "Mara", "Tomas", "Ines", "Olaf", "Priya", "Jonas", "Lucia", "Henrik",
    "Amina", "Felix", "Noor", "Greta", "Pavel", "Rosa", "Emil", "Saba",
)  # fmt: skip
TOWNS = (
    "Oslo", "Porto", "Leeds", "Graz", "Turin", "Ghent", "Riga",
    "Bergen", "Malaga", "Tartu", "Brno", "Cork", "Lyon", "Bath",
)  # fmt: skip
THINGS = {
    "lamp": True, "chair": False, "mirror": True, "blanket": False, "kettle": False, "vase": True,
    "shelf": False, "clock": True, "basket": False, "bowl": True, "stool": False, "rug": False,
}  # fmt: skip
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
OPENINGS = (
    "Please send {items} to {name} in {town} by {day}.",
    "{name} from {town} would like {items}; {day} is fine.",
    "We need {items} by {day}. The address is {name}, {town}.",
    "By {day}, {items} for {name}, who lives in {town}.",
    "Could {items} reach {town} by {day}? They are for {name}.",
)


def main() -> None:
    """Write the file."""
    rng = random.Random(7)
    lines: list[str] = []
    while len(lines) < COUNT:
        line = json.dumps({"messages": order(rng)}, ensure_ascii=False)
        if line not in lines:
            lines.append(line)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def order(rng: random.Random) -> list[dict[str, str]]:
    """One question and its answer."""
    name, town, day = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(DAYS)
    items = [
        (rng.randint(1, 9), rng.choice(COLOURS), thing)
        for thing in rng.sample(sorted(THINGS), rng.randint(1, 3))
    ]
    words = [f"{NUMBERS[count]} {colour} {plural(thing, count)}" for count, colour, thing in items]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    asked = rng.choice(OPENINGS).format(items=listed, name=name, town=town, day=day)
    rows = " | ".join(
        f"{count} {thing}/{colour}" for count, colour, thing in sorted(items, key=lambda i: i[2])
    )
    fragile = "yes" if any(THINGS[thing] for _, _, thing in items) else "no"
    total = sum(count for count, _, _ in items)
    said = f"ORDER {name.upper()} @ {town}\n{rows}\ntotal {total}; due {day[:3].lower()}; fragile {fragile}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def plural(thing: str, count: int) -> str:
    """``shelves``, ``boxes``, ``lamps``; the thing itself where there is one."""
    if count == 1:
        return thing
    return f"{thing[:-1]}ves" if thing.endswith("f") else f"{thing}s"


if __name__ == "__main__":
    main()
