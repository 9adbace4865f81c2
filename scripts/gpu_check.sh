#!/usr/bin/env bash
# Everything that wants a GPU, in one command: builds for this GPU alone, runs the tests on it and a few of them under
# compute-sanitizer, measures, and writes what it found to bench/results/GPU/, summary.md first of all. Needs no network.
#
#   scripts/gpu_check.sh                    in under nine minutes
#   scripts/gpu_check.sh --minutes 20       of longer patience
#   scripts/gpu_check.sh --skip tests,speed without these parts: build tests sanitizer speed memory overhead train_step
#                                           speed_study growth_study neunorm
#   scripts/gpu_check.sh --rivals FOLDER    installs rivals from their wheels there, for this run alone
#   scripts/gpu_check.sh --device cpu       a rehearsal where there is no GPU
#
# A part that fails or runs out of time ends neither the others nor what it has written. Exits with 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=9 skip=, rivals= device=cuda
usage() { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "${BASH_SOURCE[0]}"; }
while (($#)); do
  case $1 in
    --minutes | --skip | --rivals | --device)
      [[ $# -gt 1 ]] || { echo "$1 wants a value" >&2; exit 2; }
      case $1 in
        --minutes) minutes=$2 ;;
        --skip) skip=,$2, ;;
        --rivals) rivals=$2 ;;
        --device) device=$2 ;;
      esac
      shift 2
      ;;
    -h | --help) usage; exit ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
[[ $minutes =~ ^[0-9]+$ && $minutes -gt 0 ]] || { echo "--minutes must be a positive integer, got $minutes" >&2; exit 2; }
[[ $device == cuda || $device == cpu ]] || { echo "--device must be cuda or cpu, got $device" >&2; exit 2; }
[[ $device == cuda ]] || skip+=sanitizer,
parts="build tests sanitizer speed memory overhead train_step speed_study growth_study neunorm"
for part in ${skip//,/ }; do
  [[ " $parts " == *" $part "* ]] || { echo "--skip: there is no part $part, but $parts" >&2; exit 2; }
done
[[ -z $rivals || -d $rivals ]] || { echo "--rivals: $rivals is no folder" >&2; exit 2; }

# What the machine lacks, all of it at once; the GPU's name and architecture; what only the examples want and is missing.
machine=$(python - "$device" <<'PYTHON'
import importlib.metadata, importlib.util, sys

needed = ("torch", "setuptools", "ninja", "pytest", "hypothesis", "expecttest", "numpy", "matplotlib", "tqdm")
of_examples = ("lightning_fabric", "sklearn", "tensorboard", "tonic", "torchvision")
missing = [name for name in (*needed, *of_examples) if importlib.util.find_spec(name) is None]
lacks = [f"the Python package {name}" for name in missing if name in needed]
if "setuptools" not in missing and int((version := importlib.metadata.version("setuptools")).split(".")[0]) < 77:
    lacks.append(f"setuptools >= 77, which pyproject.toml wants: here is {version}")
name, architecture = "rehearsal", ""
if sys.argv[1] == "cuda" and "the Python package torch" not in lacks:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    else:
        lacks.append("a GPU that torch can use")
print(name, architecture, ", ".join(name for name in missing if name in of_examples), *lacks, sep="\n")
PYTHON
) || exit 2
{ read -r name; read -r TORCH_CUDA_ARCH_LIST; read -r no_examples; mapfile -t lacks; } <<<"$machine"
if [[ $device == cuda && ! -x ${CUDA_HOME:-/nowhere}/bin/nvcc ]]; then
  command -v nvcc >/dev/null || lacks+=("nvcc, on PATH or in CUDA_HOME")
fi
if ((${#lacks[@]})); then
  echo "this machine lacks:" >&2
  printf -- '- %s\n' "${lacks[@]}" >&2
  exit 2
fi
if [[ $device == cuda ]]; then
  export TORCH_CUDA_ARCH_LIST STBP_CUDA_BUILD=1
else
  export STBP_CUDA_BUILD=0
fi
out=bench/results/$(tr -c '[:alnum:]\n' - <<<"$name")
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.unfinished.json "$out/parts.tsv"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ $rivals ]]; then
  python -m pip install --quiet --no-index --no-deps --target "$work" --find-links "$rivals" "$rivals"/*.whl
  PYTHONPATH=$PYTHONPATH:$work
fi

failed=0
# How the time is shared out: what a part leaves of its own goes to those after it.
declare -A weights=([build]=120 [tests]=150 [sanitizer]=60 [speed]=75 [memory]=60 [overhead]=10 [train_step]=60
  [speed_study]=30 [growth_study]=30 [neunorm]=15)
for part in ${skip//,/ }; do unset "weights[$part]"; done
# part NAME COMMAND...: run it for its share of the time that is left.
part() {
  local name=$1 start=$SECONDS left=$((60 * minutes - SECONDS)) weight all=0 limit state
  shift
  [[ -v weights[$name] ]] || return 0
  for weight in "${weights[@]}"; do ((all += weight)); done
  ((limit = left * weights[$name] / all))
  unset "weights[$name]"
  if ((limit > 1)); then
    printf '\n=== %s (%s s, at most %s s)\n' "$name" "$SECONDS" "$limit"
    timeout --kill-after 10 --signal INT "$limit" "$@" 2>&1 | tee -a "$out/$name.log" | tail -n 25
    case ${PIPESTATUS[0]} in
      0) state=passed ;;
      124 | 137) state="cut short after $limit s" ;;
      *) state=FAILED ;;
    esac
  else
    state="no time left"
  fi
  [[ $state == passed ]] || failed=1
  printf '%s\t%s\t%s\n' "$name" "$state" $((SECONDS - start)) | tee -a "$out/parts.tsv"
}

# The tests on the GPU first, which no other machine runs.
tests() {
  local name selection status=0 options=(-q -o filterwarnings=default)
  export PYTHONWARNINGS=default  # another torch may warn of itself
  for name in build cuda_stand_in mutants compiled; do options+=(--ignore "tests/test_$name.py"); done
  if [[ $no_examples ]]; then
    echo "left out: the tests of examples/, for want of $no_examples"
    for name in data examples trainer; do options+=(--ignore "tests/test_$name.py"); done
  fi
  ! python -c 'import xdist' 2>/dev/null || options+=(-n 4)
  for selection in cuda 'not cuda'; do
    python -m pytest "${options[@]}" -m "$selection" || status=$?
    ((status != 2)) || break  # cut short
  done
  return "$status"
}
export -f tests
export no_examples

sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer on PATH"; return 1; }
  local tool
  for tool in memcheck racecheck initcheck; do
    # Without torch's own allocator, which hides the ends of tensors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 STBP_CUDA_HYPOTHESIS=quick compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all python -m pytest -q -p no:cacheprovider tests/test_lif.py tests/test_neunorm.py \
      -k 'cuda and agrees and float32 and rectangular' || return 1
  done
}
export -f sanitize

bench() { local script=$1; shift; python "bench/$script.py" --device "$device" --out "$out" "$@"; }
export -f bench
export device out

# The package's metadata, too, which an installed package has.
part build python setup.py --quiet egg_info build_ext --inplace
part tests bash -c tests
part sanitizer bash -c sanitize
part speed bash -c 'bench speed --quick --dtypes float32 bfloat16'
part memory bash -c 'bench memory --quick'
part overhead bash -c 'bench overhead --quick'
part train_step bash -c 'bench train_step --quick'
part speed_study bash -c 'bench train_step --quick --study speed'
part growth_study bash -c 'bench train_step --quick --study growth'
part neunorm bash -c 'bench neunorm --quick'
python bench/report.py --summary "$out"
printf '\n%s s in all\n' "$SECONDS"
exit "$failed"
