#!/usr/bin/env bash
# Builds the C++ tests for aarch64 and runs them under QEMU, so that the NEON kernels are tested on any machine.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user-static; exits with 77 when one of them is missing. The
# first argument, if any, names the tests to run, as for d3rt_csrc_tests.
#
# By hand rather than by CMake: no toolchain file, and the few flags are the ones of CMakeLists.txt.
set -euo pipefail

CXX=${AARCH64_CXX:-aarch64-linux-gnu-g++}
QEMU=${AARCH64_QEMU:-qemu-aarch64-static}
for tool in "$CXX" "$QEMU"; do
  if ! command -v "$tool" > /dev/null; then
    echo "skipped: no $tool (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    exit 77
  fi
done

cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

objects=()
compile() { # compile OUTPUT SOURCE [FLAG...], in the background; without its object the link fails
  while [ "$(jobs -r | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done
  "$CXX" -std=c++17 -O1 -Wall -Wextra -Werror -ffp-contract=fast -pthread -Icsrc -c "$2" -o "$build/$1.o" "${@:3}" &
  objects+=("$build/$1.o")
}
for isa in scalar neon; do
  compile "kernels_$isa" csrc/cpu/kernels.cpp "-DD3RT_ISA=$isa" "-DD3RT_ISA_$isa"
done
for source in csrc/*.cpp csrc/cpu/isa.cpp tests/csrc/*.cpp; do
  [ "$source" = csrc/bindings.cpp ] || compile "$(basename "$source" .cpp)" "$source"
done
wait
"$CXX" -static -pthread "${objects[@]}" -o "$build/d3rt_csrc_tests"
"$QEMU" "$build/d3rt_csrc_tests" "$@"
