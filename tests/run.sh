#!/usr/bin/env bash
# run.sh - runs tests, JOBS (2) at a time, and adds up their closing lines "N passed, N failed, N skipped".
#     BUILD=build tests/run.sh TOTAL 'SNIP_TEST_FEW=4 build/test_quant' tests/test_headers.sh ...
# Each argument is a command, or "NAME: command"; NAME is otherwise its first word with a slash. Its output goes to
# BUILD/NAME.log, the failures in it to the terminal. @FILE counts the total of an earlier run. TOTAL: a file for the
# closing line, where all passed.
set -u
build=${BUILD:-build} total_file=$1
shift
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
rm -f "$total_file"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}    # two tests at a time: threads that spin would wait for each other

name_of() {
    local word
    for word in $1; do
        case $word in
            *:) echo "${word%:}"; return ;;
            *=*) ;;
            */*) basename "$word" .sh; return ;;
        esac
    done
    echo unnamed
}
run() {                             # number, name, command
    local log=$build/$2.log start=$SECONDS status line
    bash -c "$3" > "$log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$log" | tail -n 1)
    if [ -z "$line" ]; then
        line="0 passed, 1 failed, 0 skipped"
        echo "$2: no closing line (exit status $status)"
        tail -n 20 "$log"
    elif [ $status -ne 0 ] || ! echo "$line" | grep -q ' 0 failed'; then
        grep -iE 'fail|error:' "$log" | head -n 20
        case $line in *" 0 failed"*) line=$(echo "$line" | sed 's/ 0 failed/ 1 failed/') ;; esac
    fi
    grep -iE '^skip' "$log" | sed "s/^/$2: /"
    echo "$line" > "$results/$1"
    printf '%-22s %s  (%d s)\n' "$2" "$line" $((SECONDS - start))
}

mkdir -p "$build"
count=0 names=" "
for command in "$@"; do
    count=$((count + 1))
    case $command in @*) cat "${command#@}" > "$results/$count"; continue ;; esac
    while [ "$(jobs -r | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    name=$(name_of "$command")
    case $command in "$name: "*) command=${command#*: } ;; esac
    case $names in *" $name "*) name=$name.$count ;; esac
    names="$names$name "
    { run "$count" "$name" "$command" > "$results/$count.out"; cat "$results/$count.out"; } &
done
wait

for i in $(seq "$count"); do cat "$results/$i" 2> /dev/null || echo "0 passed, 1 failed, 0 skipped"; done |
    awk '{ p += $1; f += $3; s += $5 } END { print p + 0 " passed, " f + 0 " failed, " s + 0 " skipped" }' > "$results/total"
cat "$results/total"
grep -qE '^[1-9][0-9]* passed, 0 failed' "$results/total" && cp "$results/total" "$total_file"
