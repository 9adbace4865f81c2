#!/usr/bin/env bash
# Everything that wants a GPU, in one command: builds for this GPU alone, runs the tests and the sanitizers on it,
# measures, and writes what it found to bench/results/GPU/, summary.md first of all, and all of that to
# bench/results/GPU.tar.gz. Needs no network.
#
#   scripts/gpu_check.sh                    in at most eight minutes
#   scripts/gpu_check.sh --minutes 20       of longer patience
#   scripts/gpu_check.sh --skip tests,speed without these parts: build tests sanitizer kernels speed overhead neunorm
#                                           neurons train_step memory
#   scripts/gpu_check.sh --train 6          also trains CIFARNet on CIFAR-10, for at most six minutes more
#   scripts/gpu_check.sh --data FOLDER      where examples/train.py finds CIFAR-10; default: data
#   scripts/gpu_check.sh --rivals FOLDER    with the rivals from there: wheels, installed for this run alone, or packages
#   scripts/gpu_check.sh --device cpu       a rehearsal where there is no GPU
#
# A part that fails or runs out of time ends neither the others nor what it has written. Exits with 1 if any failed.
#
# SpikingJelly's native LIF must be compiled for the very torch of this machine. Where that torch, nvcc and a network are:
#
#   pip download --no-deps --no-build-isolation --no-binary :all: spikingjelly==2.0.0
#   tar xf spikingjelly-2.0.0.tar.gz
#   find spikingjelly-2.0.0/ops -name native.cu -not -path '*/lif/*' -delete  # other neurons, which take long
#   export SJ_BUILD_NATIVE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0  # for an H100 or H200
#   export CPATH=$(python -c 'import nvidia; print(nvidia.__path__[0])')/cu13/include  # headers that pip brought
#   pip wheel --no-deps --no-build-isolation -w FOLDER ./spikingjelly-2.0.0
#   pip download --no-deps -d FOLDER loguru
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=8 train=0 data=data skip=, rivals= device=cuda
usage() { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "${BASH_SOURCE[0]}"; }
while (($#)); do
  case $1 in
    --minutes | --train | --data | --skip | --rivals | --device)
      [[ $# -gt 1 ]] || { echo "$1 wants a value" >&2; exit 2; }
      case $1 in
        --minutes) minutes=$2 ;;
        --train) train=$2 ;;
        --data) data=$2 ;;
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
[[ $train =~ ^[0-9]+$ ]] || { echo "--train must be a number of minutes, got $train" >&2; exit 2; }
[[ $device == cuda || $device == cpu ]] || { echo "--device must be cuda or cpu, got $device" >&2; exit 2; }
parts="build tests sanitizer kernels speed overhead neunorm neurons train_step memory"
for part in ${skip//,/ }; do
  [[ " $parts " == *" $part "* ]] || { echo "--skip: there is no part $part, but $parts" >&2; exit 2; }
done
[[ $device == cuda ]] || skip+=kernels,  # which are CUDA
[[ -z $rivals || -d $rivals ]] || { echo "--rivals: $rivals is no folder" >&2; exit 2; }
((train == 0)) || [[ -d $data ]] || { echo "--data: $data is no folder" >&2; exit 2; }

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
export PATH=$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin
if [[ $device == cuda ]]; then
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
rm -rf "$out"/*.log "$out"/*.unfinished.json "$out/parts.tsv" "$out/train"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$rivals/*.whl" >/dev/null; then
  python -m pip install --quiet --no-index --no-deps --target "$work/rivals" --find-links "$rivals" "$rivals"/*.whl
  PYTHONPATH=$PYTHONPATH:$work/rivals
elif [[ $rivals ]]; then
  PYTHONPATH=$PYTHONPATH:$(realpath "$rivals")
fi

failed=0
# How the time is shared out: what a part leaves of its own goes to those after it.
declare -A weights=([build]=90 [tests]=110 [sanitizer]=40 [kernels]=70 [speed]=60 [overhead]=12 [neunorm]=20
  [neurons]=20 [train_step]=50 [memory]=28)
for part in ${skip//,/ }; do unset "weights[$part]"; done
# run NAME SECONDS COMMAND...: run it for at most so many seconds, and note how it went.
run() {
  local name=$1 limit=$2 start=$SECONDS state
  shift 2
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
# part NAME COMMAND...: run it for its share of the time that is left.
part() {
  local name=$1 left=$((60 * minutes - SECONDS)) weight all=0 limit
  shift
  [[ -v weights[$name] ]] || return 0
  for weight in "${weights[@]}"; do ((all += weight)); done
  ((limit = left * weights[$name] / all))
  unset "weights[$name]"
  run "$name" "$limit" "$@"
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
  ! python -c 'import xdist' 2>/dev/null || options+=(-n "$(nproc)")
  for selection in cuda 'not cuda'; do
    python -m pytest "${options[@]}" -m "$selection" || status=$?
    ((status != 2)) || break  # cut short
  done
  return "$status"
}

sanitizer() {
  if [[ $device == cpu ]]; then
    python scripts/sanitize.py --device cpu
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer on PATH or in CUDA_HOME"; return 1; }
  local tool status=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "$tool"
    # Without torch's own allocator, which hides the ends of tensors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python scripts/sanitize.py || status=1
  done
  return "$status"
}

kernels() {
  nvcc -std=c++17 -O3 -arch=native -fmad=false -o "$work/kernels" bench/kernels.cu &&
    "$work/kernels" "$out/cuda_kernels.json"
}

bench() { local script=$1; shift; python "bench/$script.py" --device "$device" --out "$out" "$@"; }

train() {
  local status=0 options=()
  trap : INT  # what a run that is cut short has left is copied, too
  [[ $device == cuda ]] || options=(--network '8C3(Enc)-8C3-AP2-20FC-Voting' --train-samples 2000 --test-samples 500
    --epochs 2 --precision fp32)
  python examples/train.py cifar10-cifarnet-ours --data-dir "$data" --cache-dir "$work/cache" --device "$device" \
    --run-dir "$work/train" "${options[@]}" || status=$?
  # All but the weights.
  mkdir -p "$out/train"
  find "$work/train" -maxdepth 1 \( -name '*.md' -o -name '*.png' -o -name 'metrics.*' \) -exec cp {} "$out/train" \;
  return "$status"
}
export -f tests sanitizer kernels bench train
export no_examples device out work data

# The package's metadata, too, which an installed package has.
part build python setup.py --quiet egg_info build_ext --inplace
part tests bash -c tests
part sanitizer bash -c sanitizer
part kernels bash -c kernels
part speed bash -c 'bench speed --quick --dtypes float32 bfloat16'
part overhead bash -c 'bench overhead --quick'
part neunorm bash -c 'bench neunorm --quick'
part neurons bash -c 'bench neurons --quick'
part train_step bash -c 'bench train_step --quick'
part memory bash -c 'bench memory --quick'
((train == 0)) || run train $((60 * train)) bash -c train
python bench/report.py --summary "$out" || failed=1
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" || failed=1
printf '%s\n\n%s s in all\n' "$out.tar.gz" "$SECONDS"
exit "$failed"
