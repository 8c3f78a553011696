#!/usr/bin/env bash
# The CPU plugin's kernels on random inputs under AddressSanitizer with UBSan, then under ThreadSanitizer; the whole
# library under AddressSanitizer inside ONNX Runtime, with the tests of random and of wrong inputs. `make sanitize` runs
# it; the first argument is the virtual environment, which also gives CMake and Ninja where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
PATH="$PATH:$(pwd)/$venv/bin"
command -v cmake >/dev/null && command -v ninja >/dev/null || "$venv/bin/python" -m pip install --quiet cmake ninja

check() { # sanitizer, cases of the routing kernels, layers of the expert kernels, library ON or OFF
    local folder=build/sanitize-$1
    cmake -S plugins/cpu -B "$folder" -G Ninja -DMOE_EXPORT_LIBRARY="$4" -DMOE_EXPORT_TESTS=ON \
        -DMOE_EXPORT_WERROR=ON -DMOE_EXPORT_SANITIZER="$1" >"$folder.log" || { cat "$folder.log"; return 1; }
    cmake --build "$folder" >"$folder.log" || { cat "$folder.log"; return 1; }
    printf '%s sanitizer\n' "$1"
    "$folder/routing_test" "$2"
    "$folder/rank_routing_test" "$2"
    "$folder/exchange_test" 20
    for isa in portable avx2 avx512; do
        if [ "$isa" = portable ] || grep -qw "${isa/avx512/avx512f}" /proc/cpuinfo; then
            MOE_EXPORT_CPU_ISA=$isa "$folder/expert_mlp_test" "$3"
        fi
    done
}

mkdir -p build
check address 100 40 ON
# Preloaded, since the interpreter itself is not built with the sanitizer; what it leaks is not ours.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    MOE_EXPORT_CPU_PLUGIN=build/sanitize-address/libmoe_export_cpu.so \
    "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/plugins/test_errors.py \
    tests/plugins/test_fuzz.py tests/plugins/test_rank_routing.py tests/plugins/test_collectives.py \
    tests/plugins/test_quantized.py -k "not every_instruction_set"
check thread 40 15 OFF
