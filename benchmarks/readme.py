"""Write the README's results block from the recorded benchmark rows: ``python benchmarks/readme.py``."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- results: begin (written from benchmarks/, do not edit by hand) -->"
END = "<!-- results: end -->"
MODELS = {
    "smollm2-135m-dithered": "SmolLM2-135M-Instruct, weights dithered off their 4-bit grid",
    "smollm2-135m": "SmolLM2-135M-Instruct",
    "dense-16m": "dense-16m, a Llama of 16 M with native bf16 weights (trained for this, not distributed)",
    "moe-16m": "moe-16m, a Qwen3-MoE of 16 M with native bf16 weights (likewise)",
}
BUDGETS = ("3.5", "4.0", "4.5", "5.0", "5.5", "6.0")


def block(name: str, rows: list[dict[str, float]]) -> str:
    found = {str(row["label"]): row for row in rows}

    def cell(label: str) -> str:
        row = found.get(label)
        return f"{row['kl']:.3g} ± {row['stderr']:.1g}" if row else ""

    uniform = {"3.5": "3g64", "4.0": "3g32", "4.5": "4g64", "5.0": "4g32", "5.5": "5g64", "6.0": ""}
    lines = [
        f"**{MODELS[name]}**",
        "",
        "| bits per weight | plain uniform | ours, `none` | ours, `fast` | ours, `full` | full / uniform |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for budget in BUDGETS:
        label = uniform[budget]
        base, best = found.get(f"uniform {label}"), found.get(f"ours full @{budget}")
        ratio = f"{best['kl'] / base['kl']:.2f}" if base and best else ""
        shown = f"{cell(f'uniform {label}')} ({label})" if base else ""
        ours = " | ".join(cell(f"ours {level} @{budget}") for level in ("none", "fast", "full"))
        lines.append(f"| {budget} | {shown} | {ours} | {ratio} |")
    others = ("uniform 6g64", "mixed_4_6", "dynamic_quant 4/5 @5.0", "greedy {4,8} @5.0", "greedy {4,8} @5.5")
    compared = [f"{label} {cell(label)} at {found[label]['bpw']:.2f}" for label in others if label in found]
    return "\n".join([*lines, "", "Others, plain rounding: " + "; ".join(compared) + "."])


def cache_block(name: str, found: dict) -> str:
    """KV caches at equal true bits."""
    rows = {row["label"]: row for row in found["rows"]}
    lengths = [length for length in ("256", "1024", "4096") if length in rows["stock uniform 4"]]
    lines = [
        f"**{MODELS[name]}: KV cache**",
        "",
        "| bits per number | " + " | ".join(f"stock / ours at {int(n):,}" for n in lengths) + " | ratio |",
        "| --- |" + " --- |" * (len(lengths) + 1),
    ]
    for bits in (3, 4, 5, 6):
        stock, ours = rows[f"stock uniform {bits}"], rows[f"accepted at {bits + 0.5}"]
        cells = [f"{stock[n]['kl']:.3g} / {ours[n]['kl']:.3g}" for n in lengths]
        ratios = [ours[n]["kl"] / stock[n]["kl"] for n in lengths]
        lines.append(
            f"| {bits + 0.5} | " + " | ".join(cells) + f" | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    rule = rows["published rule {4,8} at nominal 5.0"]
    other = ", ".join(f"{rule[n]['kl']:.3g}" for n in lengths)
    return "\n".join([*lines, "", f"Greedy {{4,8}} per layer, K = V, at {rule['bits']:.2f}: {other}."])


def main() -> None:
    parts = []
    for name in MODELS:
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            parts.append(block(name, json.loads(file.read_text())))
    for name in MODELS:
        file = ROOT / "benchmarks" / "results" / f"{name}-kv.json"
        if file.is_file():
            parts.append(cache_block(name, json.loads(file.read_text())))
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{tail}")


if __name__ == "__main__":
    main()
