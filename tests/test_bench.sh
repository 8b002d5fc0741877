#!/usr/bin/env bash
# test_bench.sh - the benchmarks compile without a warning; fidelity and quality, with few steps of a tiny model and the
# scalar code, print the lines they document and refuse bad input in one line, with exit status 2. Run from the project's
# folder.
. "$(dirname "$0")/lib.sh"
cc=${CC:-cc} here=$PWD
for name in fidelity quality bench_train bench_quant bench_gemm bench_ilp; do
    case $name in
        fidelity|quality) "$cc" -std=c99 $warnings -O0 -DSNIP_NO_SIMD bench/$name.c -o "$work/$name" -lm 2> "$work/log" ;;
        *) "$cc" -std=c99 $warnings -fsyntax-only bench/$name.c 2> "$work/log" ;;
    esac && ok || fail "$name.c compiles"
done
cd "$work" || exit 1
head -c 4000 "$here/README.md" > text
: > empty
: > log
model="--data text --dim 8 --blocks 1 --heads 1 --ffn 8 --seq 8 --batch 2 --quiet"
number='-?[0-9]+(\.[0-9]+)?'
lines() { # what, how many, pattern of the line, command...; all lines of that name have the pattern
    local what=$1 count=$2 pattern=$3
    shift 3
    if "$@" > out 2> log && [ "$(grep -c "^${1#./}	" out)" = "$count" ] && [ "$(grep -cE "^${1#./}	$pattern\$" out)" = "$count" ]; then ok; else fail "$what"; grep "^${1#./}	" out | head -3; fi
}
lines "fidelity's lines" 22 "(loss|weight)	(adjoint|snip|additive)	(fp8|fp4|mixed)	(fwd|dgrad|wgrad|all)(	$number){4}" ./fidelity $model --steps 2 --batches=2 --apart 2
lines "quality's lines" 2 "default	$number	(adjoint-gemm|fp4)(	$number){4}" ./quality $model --warm 2 --steps 1 --seeds 1 --makers adjoint-gemm,fp4 --svg picture.svg
if [ "$(head -c 4 picture.svg)" = "<svg" ] && [ "$(tail -1 picture.svg)" = "</svg>" ]; then ok; else fail "the picture"; fi
bad() { # pattern, command...
    local pattern=$1
    shift
    timeout 60 "$@" > out 2> log
    if [ $? = 2 ] && [ "$(wc -l < log)" = 1 ] && grep -q -e "$pattern" log && [ ! -s out ]; then ok; else fail "$*"; fi
}
for program in ./fidelity ./quality; do
    bad "none: No such file"  $program --data none
    bad "empty: the file is empty" $program --data text --data empty
    bad "too short" $program --data text --seq 500
    bad "unknown option '--nonsense'" $program $model --nonsense
    bad "steps must be between 1" $program $model --steps 0
    bad "dim must be a multiple" $program $model --heads 3
    bad "at most 146 blocks" $program $model --blocks 147
done
bad "batches needs a whole number" ./fidelity $model --batches 3x
bad "batches needs a whole number" ./fidelity $model --batches=1
bad "batches needs a whole number" ./fidelity $model --batches
bad "apart needs a whole number between 0 and 1000" ./fidelity $model --apart -1
bad "recipe is default" ./fidelity $model --recipe=none
bad "AdamW" ./fidelity $model --optimizer sgd
bad "budgets needs" ./quality $model --budgets 2
bad "budgets needs" ./quality $model --budgets 0.5,
bad "seeds needs" ./quality $model --seeds 0
bad "settings does not know 'none'" ./quality $model --settings none
bad "makers does not know 'none'" ./quality $model --makers none
bad "ages needs" ./quality $model --ages 1 --warm 1
bad "svg draws neither" ./quality $model --plans 4 --svg picture.svg
bad "no/folder/x.svg: No such file" ./quality $model --svg no/folder/x.svg
if [ "$(head -c 4 picture.svg)" = "<svg" ]; then ok; else fail "a refused command keeps the picture"; fi
if [ -w /dev/full ]; then
    ./fidelity $model --steps 1 --batches 2 > /dev/full 2> log
    if [ $? = 2 ] && grep -q "cannot write to standard output" log; then ok; else fail "a full standard output"; fi
fi
finish
