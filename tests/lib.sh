# lib.sh - what the shell tests share: counters, a folder of their own, the closing line. Sourced first:
#     . "$(dirname "$0")/lib.sh"
# It leaves $root (the project's folder), $work (removed at the end) and $log ($work/log: what the last try printed).
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) || exit 2
log=$work/log
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"

ok() { passed=$((passed + 1)); }
fail() {                            # what; and the first lines of the log
    failed=$((failed + 1))
    echo "FAILED: $1"
    if [ -s "$log" ]; then head -n "${2:-6}" "$log"; fi
}
skip() { skipped=$((skipped + 1)); echo "skipped: $1"; }
try() {                             # what, command...
    tried=$1
    shift
    if "$@" > "$log" 2>&1; then ok; else fail "$tried"; fi
}
refuse() {                          # what, command that must fail...
    tried=$1
    shift
    if "$@" > "$log" 2>&1; then fail "$tried was accepted"; else ok; fi
}
have() { command -v "$1" > /dev/null 2>&1; }
finish() {                          # what a test ends with
    echo "$passed passed, $failed failed, $skipped skipped"
    if [ $failed -eq 0 ] && [ $((passed + skipped)) -gt 0 ]; then exit 0; fi
    exit 1
}
