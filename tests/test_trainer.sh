#!/usr/bin/env bash
# test_trainer.sh - the built trainer as its user meets it: what it writes, interruption by SIGKILL and
# resuming, and every bad input: one line on standard error, the right exit status, nothing touched.
#     tests/test_trainer.sh [TRAINER]        without an argument it is built with ${CC:-cc} -O2 -fopenmp
# ROUNDS (5) in the environment: of interruptions at random moments.
. "$(dirname "$0")/lib.sh"
if [ $# -gt 0 ]; then
    trainer=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
else
    trainer=$work/train_llama
    "${CC:-cc}" -O2 -fopenmp "$root/examples/train_llama.c" -o "$trainer" -lm || exit 1
fi
cd "$work" || exit 1
export OMP_WAIT_POLICY=passive
fail() { failed=$((failed + 1)); echo "FAILED: $*"; }
check() { local what=$1; shift; if "$@" >/dev/null 2>&1; then ok; else fail "$what"; fi; }
same()  { local what=$1; if cmp -s "$2" "$3"; then ok; else fail "$what"; diff "$2" "$3" | head -4; fi; }

mkdir data
head -c 24000 "$root/snip.h" > data/text
model="--dim 32 --blocks 2 --heads 2 --kv-heads 1 --ffn 48 --seq 32 --batch 4"
base="--data data/text $model --steps 24 --every 8 --save-every 5 --val-every 10 --quiet"
run()  { "$trainer" "$@"; }
# loss.csv without tokens_per_s, the one column that depends on the clock
losses() { cut -d, -f1-3,5 "$1"; }

# ---- an ordinary run, and what it leaves ----
if run $base --out ref --threads 1 > ref.out 2> ref.err; then ok; else fail "an ordinary run"; cat ref.err; fi
check "--quiet says nothing on standard error" test ! -s ref.err
check "the report's place is printed" grep -q "ref/report.html" ref.out
for f in loss.csv plan.txt plan.svg report.html model.safetensors; do check "$f is written" test -s "ref/$f"; done
check "no temporary file is left" test -z "$(find . -name '*.tmp')"
check "loss.csv's header" test "$(head -1 ref/loss.csv)" = "step,loss,val_loss,tokens_per_s,fp4_share"
check "one row for every step" test "$(wc -l < ref/loss.csv)" = 25
check "val_loss where evaluated, and at the last step" test "$(awk -F, 'NR > 1 && $3 != "" { printf "%s ", $1 }' ref/loss.csv)" = "10 20 24 "
check "the plan meets the budget" awk -F, 'END { exit !($5 >= 0.75) }' ref/loss.csv
check "the loss falls" awk -F, 'NR == 2 { first = $2 } END { exit !($2 < first - 0.5 && first > 5) }' ref/loss.csv
losses ref/loss.csv > ref.losses
run $base --out threads --threads 3 > /dev/null 2>&1
losses threads/loss.csv > got; same "three threads give the losses of one" ref.losses got
run ${base//--steps 24/--steps=24} --out=equals --threads=2 > /dev/null 2>&1
losses equals/loss.csv > got; same "--opt=value" ref.losses got
check "--help" run --help
for p in f32 bf16 fp8 fp4; do
    check "--precision $p" run $base --steps 3 --precision $p --out p_$p
done
check "fp4 puts everything in FP4" awk -F, 'NR > 1 && $5 != 1 { bad = 1 } END { exit bad }' p_fp4/loss.csv
check "f32 puts nothing there" awk -F, 'NR > 1 && $5 != 0 { bad = 1 } END { exit bad }' p_f32/loss.csv
check "plan.txt says why the plan is what it is" grep -q "; step [0-9]*: the first plan\|; step [0-9]*: the plan stays\|; step [0-9]*: [0-9]* GEMMs change" ref/plan.txt
run ${base/--quiet/} --steps 10 --out reasons > /dev/null 2> err
check "and so does the terminal" grep -q "snip: step 9: the first plan: predicted harm" err
for to in fp8 bf16 none; do            # a loss that stands still, and a threshold within its noise
    run ${base/--quiet/} --steps 45 --every 20 --lr 1e-9 --spike 0.3 --fallback $to --out spike_$to > /dev/null 2> err
    case $to in none) want="; measuring" ;; *) want="; [0-9]* GEMMs in $to until the next measurement" ;; esac
    check "a spike, falling back to $to" grep -qE "snip: step [0-9]+: the loss spikes: 5.[0-9]*, mean 5.[0-9]*, deviation [0-9.]*$want" err
    check "is measured" grep -qE "snip: step (3[4-9]|40): (a new plan after the fall back|the plan stays|[0-9]+ GEMMs change)" err
done
check "--spike -1: none is" sh -c "! '$trainer' ${base/--quiet/} --steps 45 --every 20 --lr 1e-9 --spike=-1 --out spike_off 2>&1 | grep -q spikes"
for opt in sgd lion; do
    check "--optimizer $opt" run $base --optimizer $opt --out $opt
    check "$opt: the loss falls" awk -F, 'NR == 2 { first = $2 } END { exit !($2 < first - 0.2 && first > 5 && $5 >= 0.75) }' $opt/loss.csv
    check "$opt: m alone is saved" sh -c "head -c 20000 $opt/model.safetensors | grep -aq optimizer.m && ! head -c 20000 $opt/model.safetensors | grep -aq optimizer.v"
done
check "other optimizers, other losses" sh -c '! cmp -s sgd/loss.csv ref/loss.csv && ! cmp -s sgd/loss.csv lion/loss.csv'
check "--tied" run $base --steps 3 --tied --out tied
check "tied: no output tensor" sh -c '! head -c 4000 tied/model.safetensors | grep -aq output.weight'
check "--stages" run $base --stages 2 --out stages
check "stages: the plan meets the budget" awk -F, 'END { exit !($5 >= 0.75) }' stages/loss.csv
run $base --steps 2 --precision f32 --out whole > /dev/null 2>&1
run $base --steps 2 --precision f32 --batch 2 --accum 2 --out halves > /dev/null 2>&1
check "--accum 2 of batch 2 is batch 4 to rounding" sh -c "paste -d, whole/loss.csv halves/loss.csv | awk -F, 'NR > 1 { d = \$2 - \$7; if (d < 0) d = -d; if (!(d < 1e-5)) bad = 1; n++ } END { exit bad || n != 2 }'"
check "--plan trains under a plan" run $base --steps 4 --plan ref/plan.txt --budget 0.75 --out planned
check "--plan keeps its share from the first step on" sh -c "test \$(tail -1 ref/loss.csv | cut -d, -f5) = \$(sed -n 2p planned/loss.csv | cut -d, -f5)"
check "--compare" run $base --steps 4 --compare bf16,fp4 --out cmp
for f in bf16/loss.csv fp4/loss.csv bf16/model.safetensors fp4/plan.txt report.html; do check "--compare writes $f" test -s cmp/$f; done

# ---- llm.c's .bin: the same bytes as uint16 tokens give the same losses ----
n=$(wc -c < data/text)
{
    printf '\x88\xd8\x34\x01\x01\x00\x00\x00'
    printf "\\x$(printf %02x $((n & 255)))\\x$(printf %02x $((n >> 8 & 255)))\\x00\\x00"
    head -c 1012 /dev/zero
    printf "$(od -An -v -tx1 data/text | tr -d '\n' | sed 's/ \(..\)/\\x\1\\x00/g')"
} > data/t.bin
run ${base//data\/text/data/t.bin} --out bin > /dev/null 2>&1
losses bin/loss.csv > got; same ".bin tokens" ref.losses got

# ---- safetensors as others read it ----
cat > read.py <<'PY'
import sys
from safetensors import safe_open
with safe_open("ref/model.safetensors", framework="numpy") as f:
    names = set(f.keys())
    assert f.metadata()["step"] == "24"
    assert f.get_tensor("blocks.0.attn.k.weight").shape == (16, 32)
    assert f.get_tensor("optimizer.v.embed.weight").shape == (256, 32)
    assert f.get_tensor("norm.weight").dtype == "float32"
    loss = [float(r.split(",")[1]) for r in open("ref/loss.csv").read().split()[1:]]
    assert all(abs(a - b) < 1e-6 for a, b in zip(f.get_tensor("history.loss"), loss))
PY
if python3 -c 'import safetensors, numpy' 2> /dev/null; then check "the safetensors package reads it" python3 read.py
else skip "the Python package safetensors is not installed"; fi

# ---- SIGKILL at any moment, then --resume, with the same and with another number of threads ----
for round in $(seq "${ROUNDS:-5}"); do     # the trainer itself in the background, not run(): its pid is needed
    out=kill$round
    for try in 1 2 3; do
        "$trainer" $base --out $out $([ -d $out ] && echo --resume) --threads $((round % 3 + 1)) > /dev/null 2>&1 &
        pid=$!
        sleep 0.$((RANDOM % 5))$((RANDOM % 10))
        kill -9 $pid 2> /dev/null
        wait $pid 2> /dev/null
        [ -f $out/loss.csv ] && { head -c -1 $out/loss.csv | tail -n +2 | awk -F, 'NF != 5 || $1 != NR { exit 1 }' || fail "loss.csv is whole after SIGKILL"; }
    done
    mkdir -p $out
    if run $base --out $out --resume --threads $((round % 2 + 1)) > /dev/null 2> err; then ok; else fail "resuming after SIGKILL: $(cat err)"; fi
    losses $out/loss.csv > got; same "losses after SIGKILL and --resume, round $round" ref.losses got
done
for opt in sgd lion; do             # killed in mid-run, resumed with another number of threads: the same bits
    losses $opt/loss.csv > opt.losses
    "$trainer" $base --optimizer $opt --out kill_$opt --threads 1 > /dev/null 2>&1 & pid=$!
    for i in $(seq 400); do [ "$(cat kill_$opt/loss.csv 2> /dev/null | wc -l)" -gt 12 ] && break; sleep 0.01; done
    kill -9 $pid 2> /dev/null; wait $pid 2> /dev/null
    run $base --optimizer $opt --out kill_$opt --resume --threads 2 > /dev/null 2> err || fail "resuming $opt: $(cat err)"
    losses kill_$opt/loss.csv > got; same "$opt: losses after SIGKILL and --resume" opt.losses got
    same "$opt: the plan and its reason too" $opt/plan.txt kill_$opt/plan.txt
done
"$trainer" $base --out exact > /dev/null 2>&1 & pid=$!    # surely in mid-run, surely from a checkpoint
for i in $(seq 400); do [ "$(cat exact/loss.csv 2> /dev/null | wc -l)" -gt 12 ] && break; sleep 0.01; done
kill -9 $pid 2> /dev/null; wait $pid 2> /dev/null
run ${base/--quiet/} --out exact --resume --threads 2 > /dev/null 2> err
check "--resume starts from a checkpoint" grep -qE "resumed after step (10|15|20|24)" err
losses exact/loss.csv > got; same "losses of that run" ref.losses got
check "--resume of a finished run" run $base --out exact --resume
losses exact/loss.csv > got; same "changes no loss" ref.losses got
run $base --steps 12 --out extended > /dev/null 2>&1
check "--resume with more steps" run $base --out extended --resume
check "has all of them" test "$(wc -l < extended/loss.csv)" = 25

# ---- OpenMP's threads wait without spinning where the user has not said otherwise ----
spin() { # what the runtime, GCC's or LLVM's, says of how long its threads spin
    env "$@" OMP_DISPLAY_ENV=verbose "$trainer" $base --steps 1 --out policy 2>&1 | sed -nE "s/.*(GOMP_SPINCOUNT|KMP_BLOCKTIME) *= *'([0-9]*).*/\2/p" | tail -1
}
if [ -n "$(spin OMP_WAIT_POLICY=active)" ]; then
    check "threads do not spin by default" test "$(spin -u OMP_WAIT_POLICY)" = 0
    check "and do where the user says so" test "$(spin OMP_WAIT_POLICY=active)" != 0
else echo "skipped: the trainer was built without OpenMP"; fi

# ---- training that breaks ----
run $base --precision f32 --lr 1e30 --warmup 0 --out nan > out 2> err
check "NaN: exit status 1" test $? = 1
check "NaN: one line names step and layer" sh -c 'test "$(wc -l < err)" = 1 && grep -qE "step [0-9]+: layer [0-9a-z.]+" err'

# ---- bad input ----
tree() { find . -not -path ./out -not -path ./err -not -path ./before -not -path ./after | sort | while read -r f; do [ -f "$f" ] && cksum "$f" || echo "$f"; done; }
limit=unlimited                     # of a file's size, in blocks of 1024 bytes
bad() {                             # bad WHAT PATTERN ARGUMENT...
    local what=$1 pattern=$2 status
    shift 2
    tree > before
    (ulimit -f "$limit"; exec timeout 60 "$trainer" "$@") > out 2> err
    status=$?
    tree > after
    if [ $status != 2 ]; then fail "$what: exit status $status"
    elif [ "$(wc -l < err)" != 1 ]; then fail "$what: $(wc -l < err) lines on standard error"; head -3 err
    elif ! grep -qi -e "$pattern" err; then fail "$what: $(cat err)"
    elif [ -s out ]; then fail "$what: wrote to standard output"
    elif ! cmp -s before after; then fail "$what: files changed"; diff before after | head -3
    else ok; fi
}
: > data/empty
head -c 100 data/text > data/tiny
mkdir data/folder
{ printf 'x'; tail -c +2 data/t.bin; } > data/magic.bin
head -c 9001 data/t.bin > data/short.bin
head -c 100 data/t.bin > data/header.bin
cat data/t.bin data/tiny > data/long.bin
{ head -c 4 data/t.bin; printf '\x07'; tail -c +6 data/t.bin; } > data/version.bin
new="$model --steps 4 --out new"
bad "no data"            "no --data"      $new
bad "missing data"       "no such file"   $new --data data/none
bad "empty data"         "empty"          $new --data data/empty
bad "one of two empty"   "empty"          $new --data data/text --data data/empty
bad "tiny data"          "too short"      $new --data data/tiny
bad "a folder as data"   "data/folder"    $new --data data/folder
if [ "$(id -u)" != 0 ]; then
    cp data/text data/secret; chmod 000 data/secret
    bad "unreadable data" "permission" $new --data data/secret
fi
bad "wrong magic"        "magic"          $new --data data/magic.bin
bad "truncated .bin"     "truncated"      $new --data data/short.bin
bad "cut in the header"  "header"         $new --data data/header.bin
bad "too long .bin"      "too long"       $new --data data/long.bin
bad "another version"    "version"        $new --data data/version.bin
bad "text and .bin"      "mixed"          $new --data data/text --data data/t.bin
new="--data data/text $new"
bad "unknown option"     "--nonsense"     $new --nonsense
bad "unknown =option"    "--nonsense"     $new --nonsense=3
bad "stray word"         "stray"          $new stray
bad "prefix of one"      "--step"         $new --step 4
bad "missing value"      "needs a value"  $new --steps
bad "value for a flag"   "no value"       $new --tied=1
bad "not a number"       "--steps"        $new --steps ten
bad "half a number"      "--steps"        $new --steps 10x
bad "fraction of a step" "--steps"        $new --steps 1.5
bad "no steps"           "--steps"        $new --steps 0
bad "negative steps"     "--steps"        $new --steps -4
bad "huge number"        "--steps"        $new --steps 99999999999999999999
bad "empty number"       "--seed"         $new --seed=
bad "empty folder name"  "--out"          $new --out=
bad "budget above 1"     "--budget is a share, 0 to 1" $new --budget 1.01
bad "budget below 0"     "--budget is a share, 0 to 1" $new --budget -0.1
bad "budget NaN"         "--budget"       $new --budget nan
bad "budget infinite"    "--budget"       $new --budget inf
bad "budget no number"   "--budget"       $new --budget much
bad "rate 0"             "--lr"           $new --lr 0
bad "dim and heads"      "--heads"        $new --dim 100 --heads 3
bad "heads, kv-heads"    "--kv-heads"     $new --heads 4 --kv-heads 3
bad "odd head"           "even"           $new --dim 30 --heads 2
bad "too many stages"    "--stages"       $new --stages 3
bad "huge batch"         "--batch"        $new --batch 1000000 --seq 1000
bad "no such optimizer"  "adam"           $new --optimizer adam
bad "no such fallback"   "fp6"            $new --fallback fp6
bad "margin no number"   "--margin"       $new --margin wide
bad "no such precision"  "fp3"            $new --precision fp3
bad "in a list"          "fp3"            $new --compare bf16,fp3
bad "twice in a list"    "twice"          $new --compare fp8,fp8
bad "empty in a list"    "--compare"      $new --compare fp8,,fp4
bad "list and precision" "--compare"      $new --compare fp8 --precision fp4
bad "missing plan"       "none.txt"       $new --plan none.txt
head -c $(($(wc -c < ref/plan.txt) / 2)) ref/plan.txt > data/half.txt
bad "truncated plan"     "half.txt"       $new --plan data/half.txt
bad "text as plan"       "data/text"      $new --plan data/text
bad "empty plan"         "data/empty"     $new --plan data/empty
bad "another's plan"     "plan.txt"       $new --plan ref/plan.txt --blocks 3
bad "too small a plan"   "--budget"       $new --plan ref/plan.txt --budget 1
bad "plan and precision" "--plan"         $new --plan ref/plan.txt --precision fp8
bad "folder in a file"   "data/text"      $new --out data/text/x
bad "file as folder"     "data/text"      $new --out data/text
bad "folder in /proc"    "/proc"          $new --out /proc/none/x
bad "resume from nothing" "no such file"  $new --out nowhere --resume

again="$base --out hurt --resume"
hurt() { rm -rf hurt; cp -r ref hurt; }
size=$(wc -c < ref/model.safetensors)
hurt; head -c $((size - 1)) ref/model.safetensors > hurt/model.safetensors
bad "checkpoint short of a byte" "truncated" $again
for cut in 0 5 8 300 $((size / 2)); do
    head -c $cut ref/model.safetensors > hurt/model.safetensors
    bad "checkpoint cut at $cut" "model.safetensors: truncated" $again
done
hurt; echo >> hurt/model.safetensors
bad "checkpoint with a byte too many" "damaged" $again
for at in 0 3 9 60 2000 $((size / 3)) $((size / 2)) $((size - 1)); do
    { head -c $at ref/model.safetensors; printf '\xa5'; tail -c +$((at + 2)) ref/model.safetensors; } > hurt/model.safetensors
    bad "checkpoint damaged at $at" "model.safetensors: \(damaged\|not \|truncated\)" $again
done
cp data/text hurt/model.safetensors
bad "text as checkpoint" "model.safetensors" $again
hurt
bad "resume: another shape"     "--blocks"    $again --blocks 1
bad "resume: another seed"      "--seed"      $again --seed 2
bad "resume: another precision" "--precision" $again --precision fp8
bad "resume: another optimizer" "--optimizer" $again --optimizer lion
bad "resume: other data"        "--data"      $again --data data/tiny
bad "resume: fewer steps"       "--steps"     $again --steps 10
rm -rf hurtcmp; cp -r cmp hurtcmp; echo >> hurtcmp/fp4/model.safetensors
bad "resume: one of two damaged" "fp4/model.safetensors" $base --steps 4 --compare bf16,fp4 --out hurtcmp --resume

# ---- a full disk: the file-size limit makes writes fail just so ----
limit=64
bad "full disk over an old run" "cannot write hurt/model.safetensors" $base --out hurt
limit=unlimited
(ulimit -f 64; exec "$trainer" $base --steps 30 --out hurt --resume) > /dev/null 2> err
check "full disk while resuming: exit status 2" test $? = 2
check "keeps the checkpoint" cmp ref/model.safetensors hurt/model.safetensors
check "and says so in one line" sh -c 'test "$(wc -l < err)" = 1 && grep -q "cannot write" err'
check "and leaves no temporary file" test -z "$(find hurt -name '*.tmp')"
check "and the run can go on" run $base --steps 30 --out hurt --resume
if [ -w /dev/full ]; then
    run $base --steps 2 --out new_full > /dev/full 2> err
    check "full standard output: exit status 2" test $? = 2
fi
# ---- what is no file is not written over ----
mkdir other
for f in loss.csv plan.txt plan.svg report.html model.safetensors; do
    mkfifo other/$f
    bad "a pipe in the place of $f" "cannot write other/$f: it is there and not a regular file" $base --out other
    rm other/$f
done
# ---- a folder in use, an earlier run in it, a polite end ----
run $base --steps 6 --out used > /dev/null 2>&1
cp used/model.safetensors earlier
run ${base/--quiet/} --steps 4 --out used > /dev/null 2> err
check "without --resume an earlier run's checkpoint is kept" cmp earlier used/model.safetensors.old
check "and that is said" grep -q "^used/model.safetensors: an earlier run's, kept as model.safetensors.old" err
"$trainer" ${base/--quiet/} --steps 100000 --save-every 0 --out used > /dev/null 2> polite & pid=$!
for i in $(seq 400); do [ "$(wc -l < used/loss.csv)" -gt 8 ] && break; sleep 0.01; done
run $base --steps 4 --out used > /dev/null 2> err
check "a second run in one folder: exit status 2" test $? = 2
check "and one line that says so" sh -c 'test "$(wc -l < err)" = 1 && grep -q "^train_llama: used: another run is writing here" err'
kill -TERM $pid; wait $pid
check "SIGTERM ends it" test $? = 143
last=$(sed -n 's/^snip: stopped after step \([0-9]*\); --resume goes on$/\1/p' polite)
check "after a whole step" test "${last:-0}" = $(($(wc -l < used/loss.csv) - 1))
"$trainer" ${base/--quiet/} --steps 100000 --save-every 0 --out used --resume > /dev/null 2> again & pid=$!
for i in $(seq 400); do grep -q resumed again && break; sleep 0.01; done
kill -9 $pid; wait $pid 2> /dev/null
check "which is saved" grep -q "snip: resumed after step $last\$" again
run ${base/--quiet/} --steps 2 --out nothing_yet > /dev/null 2>&1; rm nothing_yet/model.safetensors
run ${base/--quiet/} --steps 2 --out nothing_yet --resume > /dev/null 2> err
check "--resume says that there is no checkpoint" grep -q "^nothing_yet/model.safetensors: no checkpoint: from the start" err
bad "--speedup out of reach" "--speedup 99: with this model the linear layers can be at most" $base --speedup 99 --out new_speedup
finish
