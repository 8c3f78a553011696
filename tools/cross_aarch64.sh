#!/usr/bin/env bash
# The CPU plugin's kernels and the library itself built for aarch64 by a cross-compiler, and the kernels' checks run
# under qemu. `make cross-aarch64` runs it. Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
PATH="$PATH:$(pwd)/$venv/bin"
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do
    command -v $tool >/dev/null || {
        echo "error: $tool is not installed; apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2
        exit 3
    }
done
command -v cmake >/dev/null && command -v ninja >/dev/null || "$venv/bin/python" -m pip install --quiet cmake ninja

folder=build/aarch64
mkdir -p build
cmake -S plugins/cpu -B "$folder" -G Ninja -DMOE_EXPORT_TESTS=ON -DMOE_EXPORT_WERROR=ON \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >"$folder.log" || { cat "$folder.log"; exit 1; }
cmake --build "$folder" >"$folder.log" || { cat "$folder.log"; exit 1; }
run() { qemu-aarch64-static -L /usr/aarch64-linux-gnu "$@"; }
printf 'library: %s\n' "$(od -An -tx1 -j18 -N1 "$folder/libmoe_export_cpu.so" | sed 's/ b7/aarch64/')"
run "$folder/routing_test" "${2:-40}"
run "$folder/rank_routing_test" "${2:-40}"
run "$folder/exchange_test" 10
run "$folder/expert_mlp_test" "${3:-15}"
