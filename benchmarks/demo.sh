#!/usr/bin/env bash
# What `make demo` runs: a real small model measured, allocated, converted at 5.0 bits, verified, compared
# with uniform quantization at true stored bits, drawn, and generating through stock mlx-lm.
# Stopped anywhere, it goes on from there when run again; delete demo/ to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
export BIN=$bin
step() { printf '\n── %s\n' "$*" >&2; }

step "The model: SmolLM2-135M-Instruct"
model=$(bash benchmarks/small_model.sh demo)
result=$model-optiq-5.0bpw

step "Measure, allocate, convert at 5.0 stored bits per weight, verify"
if [ -f "$result/config.json" ]; then
  echo "already there: $result" >&2
else
  # Its report is shown below, once it can say what was measured.
  "$bin/optiq" convert "$model" --target-bpw 5.0 --no-score -o "$result" >demo/convert.txt
  sed -n '/^Verified/,/^Written/p' demo/convert.txt
fi

step "Compare on held-out text with uniform 4, 5 and 6 bits, at true stored bits"
scores=$result/optiq/score.json
if [ -f "$scores" ]; then
  echo "already there: $scores" >&2
else
  "$bin/optiq" score "$model" "$result" --uniform 4,5,6 -o "$scores" >demo/score.txt
fi

step "What came out"
"$bin/optiq" report "$result"
"$bin/optiq" report "$result" --format html --out demo/report.html
echo "the same with all details: demo/report.html; the model card: $result/README.md" >&2

step "Generate through stock mlx-lm (on a CPU about one word a second: it computes in bfloat16 there)"
MLX_OPTIQ_DISABLE=1 "$bin/mlx_lm.generate" --model "$result" --max-tokens 40 \
  --prompt "In two sentences: why is the sky blue?"
