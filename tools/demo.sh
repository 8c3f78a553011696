#!/usr/bin/env bash
# The main job from end to end on the model that ships with the repository: build an engine, verify it against its
# source, measure the speed-up, generate text. `make demo` runs it; needs `moe-export` on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

model=examples/byte-mixtral
bundle=${1:-out/demo}
mkdir -p "$(dirname "$bundle")"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run moe-export build "$model" -o "$bundle" --overwrite --config tools/demo.toml
run moe-export verify "$bundle"
run moe-export run "$bundle" --max-new-tokens 160 --temperature 0.8 --seed 7 \
    --prompt $'class Reader:\n    def __init__(self, path):\n        self.path = path\n        self.'

printf '\nThe whole report: %s\n' "$bundle/evidence/report.html"
