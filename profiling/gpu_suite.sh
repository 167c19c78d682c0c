#!/usr/bin/env bash
# Measure everything on this machine's card:  bash profiling/gpu_suite.sh [PART ...]
#
# Parts: correctness kernels memory throughput caps scaling train (all if none is named). Each writes its rows at once under
# profiling/results/<card>/, stops after BUDGET seconds (default 420) and goes on where it stopped when called again.
# With no card a tiny CPU subset runs, and each part says what is missing.
# PYTHON names the interpreter (default: .venv's, else python3); OUTPUT another folder of results.
set -u

# A function, so that bash has read all of it before a pull changes this file under its feet.
main() {
    cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
    budget=${BUDGET:-420}
    output=${OUTPUT:-profiling/results}
    known="correctness kernels memory throughput caps scaling train"

    parts=("$@")
    [ $# -gt 0 ] || read -ra parts <<<"$known"
    for part in "${parts[@]}"; do
        case " $known " in
            *" $part "*) ;;
            *) echo "gpu_suite: there is no part '$part'; there are: $known." >&2; exit 2 ;;
        esac
    done

    suite="$PWD/profiling/card/suite.py"
    # From outside, because inside the checkout ./fastlocal is found whether it is installed or not.
    installed() {
        (cd / && "$python" -c 'import importlib.util as u, os, sys
try: found = u.find_spec("fastlocal.profiling.card.suite")
except ImportError: found = None
sys.exit(found is None or os.path.realpath(found.origin) != os.path.realpath(sys.argv[1]))' "$suite")
    }
    if ! installed; then
        # No registry is asked: what is there is used, torch above all.
        "$python" -m pip install -q --no-deps --no-build-isolation -e . || exit 2
        installed || { echo "gpu_suite: pip installed fastlocal, but $python does not find this checkout." >&2; exit 2; }
    fi
    for package in torch timm; do
        "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" ||
            { echo "gpu_suite: $python has no $package; install it, or name another interpreter in PYTHON." >&2; exit 2; }
    done
    # What is too old is told and not refused: most parts run all the same.
    "$python" -m pip check 2>/dev/null | sed -n 's/^fastlocal /gpu_suite: fastlocal /p' >&2

    status=0
    declare -A outcome seconds
    for part in "${parts[@]}"; do
        printf '\n=== %s ===\n' "$part"
        begun=$SECONDS
        # A part stops by itself; the limit is for one that hangs.
        timeout $((${budget%.*} + 60)) "$python" -m fastlocal.profiling.card.suite "$part" --budget "$budget" --output "$output"
        case $? in
            0) outcome[$part]=ok ;;
            124) outcome[$part]="stopped by force"; status=1 ;;
            *) outcome[$part]=WRONG; status=1 ;;
        esac
        seconds[$part]=$((SECONDS - begun))
    done

    printf '\n=== report ===\n'
    if compgen -G "$output/*/*.jsonl" >/dev/null; then
        "$python" -m fastlocal.profiling report --output "$output" || status=1
    else
        echo "Nothing was measured."
    fi
    printf '\n| part        | outcome          | seconds |\n|-------------|------------------|--------:|\n'
    for part in "${parts[@]}"; do
        printf '| %-11s | %-16s | %7d |\n' "$part" "${outcome[$part]}" "${seconds[$part]}"
    done
    return $status
}

main "$@"
exit $?
