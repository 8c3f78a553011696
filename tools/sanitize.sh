#!/usr/bin/env bash
# The CPU plugin's kernels on random inputs under AddressSanitizer with UBSan, then under ThreadSanitizer. Needs
# neither ONNX Runtime nor Python code. `make sanitize` runs it; the first argument is the virtual environment that
# gives CMake and Ninja where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
PATH="$PATH:$(pwd)/$venv/bin"
command -v cmake >/dev/null && command -v ninja >/dev/null || "$venv/bin/python" -m pip install --quiet cmake ninja

check() { # sanitizer, cases of the routing kernels, layers of the expert kernels
    local folder=build/sanitize-$1
    cmake -S plugins/cpu -B "$folder" -G Ninja -DMOE_EXPORT_LIBRARY=OFF -DMOE_EXPORT_TESTS=ON \
        -DMOE_EXPORT_SANITIZER="$1" >"$folder.log" || { cat "$folder.log"; return 1; }
    cmake --build "$folder" >"$folder.log" || { cat "$folder.log"; return 1; }
    printf '%s sanitizer\n' "$1"
    "$folder/routing_test" "$2"
    for isa in portable avx2 avx512; do
        if [ "$isa" = portable ] || grep -qw "${isa/avx512/avx512f}" /proc/cpuinfo; then
            MOE_EXPORT_CPU_ISA=$isa "$folder/expert_mlp_test" "$3"
        fi
    done
}

mkdir -p build
check address 100 40
check thread 40 15
