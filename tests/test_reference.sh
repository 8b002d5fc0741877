#!/bin/sh
# test_reference.sh - runs reference_quant.py, where there is a Python. Run from the project's folder.
if command -v python3 > /dev/null 2>&1; then exec python3 "$(dirname "$0")/reference_quant.py"; fi
echo "skipped: reference_quant.py: no python3"
echo "0 passed, 0 failed, 1 skipped"
