#!/usr/bin/env bash
# The main job, from ratings to a table: ./run_pipeline.sh [--full] [options]
#
# Sets up a virtual environment, fetches model, encoder and ratings, and then runs the stages as a chain of commands,
# which it prints as it goes; copy one to change it. Started again, it goes on after the last finished stage.
#
#   prepare_data -> SFT -> cluster/exposure negatives -> DPO on hard, DPO on long-tail, S-DPO on both
#                -> predictions of the origin model, the SFT model and the three aligned ones -> evaluation -> CSV
#
# Options:
#   --full                      1,024 training, 256 validation and 1,000 test records; without it a small size that
#                               takes 10 to 15 minutes on two CPU cores
#   --data_dir DIR              a data folder of your own (see sampled_data/README.md); default: MovieLens-100K
#   --model_name_or_path NAME   folder or hub name of the base model; default: HuggingFaceTB/SmolLM2-135M-Instruct
#   --encoder NAME              folder or name of the sentence encoder; default: all-MiniLM-L6-v2
#   --output_dir DIR            default: output/<data>_quick or output/<data>_full
#   --seed N                    default: 42; another one samples MovieLens anew, unless --data_dir is given
#   --train N --valid N --test N   records to use, in place of the two sizes
#   --preferences N             training records that get negatives and are aligned on; default: all, or 40 at the
#                               small size
#   --dry_run                   print the plan and the commands, run nothing
#   --help
set -euo pipefail

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "run_pipeline.sh: error: $*" >&2; exit 2; }
absolute() { if [[ -e $1 ]]; then realpath "$1"; else echo "$1"; fi; }

data='' model=HuggingFaceTB/SmolLM2-135M-Instruct encoder=all-MiniLM-L6-v2 output='' seed=42
size=quick train='' preferences='' valid='' test='' dry_run=''
while (($#)); do
  case $1 in
    --full) size=full; shift; continue ;;
    --dry_run) dry_run=1; shift; continue ;;
    --help | -h) usage; exit 0 ;;
    --data_dir | --model_name_or_path | --encoder | --output_dir | --seed | --train | --preferences | --valid | --test) ;;
    *) fail "unknown option $1; --help lists what exists" ;;
  esac
  (($# > 1)) || fail "$1 needs a value"
  case $1 in
    --data_dir) [[ -d $2 ]] || fail "$2: no such data folder; prepare_data.py makes one"; data=$(absolute "$2") ;;
    --model_name_or_path) model=$(absolute "$2") ;;
    --encoder) encoder=$(absolute "$2") ;;
    --output_dir) output=$(realpath -m "$2") ;;
    *) [[ $2 =~ ^[0-9]+$ ]] || fail "$1 needs a number, not '$2'"
       case $1 in --seed) seed=$2 ;; --train) train=$2 ;; --preferences) preferences=$2 ;; --valid) valid=$2 ;; --test) test=$2 ;; esac ;;
  esac
  shift 2
done
cd "$(dirname "$(realpath "$0")")"

case $size in
  quick) : "${preferences:=${train:-40}}" "${train:=128}" "${valid:=16}" "${test:=64}" ;;
  full) : "${train:=1024}" "${preferences:=$train}" "${valid:=256}" "${test:=1000}" ;;
esac
movielens=''
if [[ -z $data ]]; then # another seed is another sample, in a folder of its own
  movielens=1 data=sampled_data/ml-100k
  ((seed == 42)) || data+=_seed$seed
fi
dataset=$(basename "$data")
output=${output:-output/${dataset}_$size}
negatives=$output/cluster_exposure

# -- The plan: seconds as measured on two CPU cores without bfloat16 (docs/timings.md), per record and per start ---------
minutes() { echo $((($1 + 59) / 60)); }
sft_s=$((20 + 21 * train / 10 + 8 * valid / 10))
negatives_s=$((20 + (preferences + valid) * 15 / 10))
hard_s=$((25 + preferences * 14 / 10 + valid * 8 / 10))
two_s=$((25 + preferences * 16 / 10 + valid))
predict_s=$((15 + test * 4 / 10))
evaluate_s=12
total_s=$((10 + sft_s + negatives_s + 2 * hard_s + two_s + 5 * (predict_s + evaluate_s)))
cat <<PLAN
$dataset: $train training ($preferences aligned on), $valid validation, $test test records -> $output
  about $(minutes $sft_s) min          supervised fine-tuning
  about $(minutes $negatives_s) min          candidates and negatives
  about $(minutes $((2 * hard_s + two_s))) min          DPO on hard, DPO on long-tail, S-DPO on two negatives
  about $(minutes $((5 * predict_s))) min          predictions of five models
  about $(minutes $((5 * evaluate_s))) min          evaluation
  about $(minutes $total_s) min in all, after the downloads, on two CPU cores; a GPU takes a fraction
PLAN
[[ $dry_run ]] || source ./set_up.sh

# -- The stages -------------------------------------------------------------------------------------------------------
ran=''
stage() { # stage NAME RESULT COMMAND...: runs the command unless it has been run before and nothing before it has since
  local name=$1 result=$2 words note=$output/.stages/$1
  shift 2
  words=$(printf '%q ' "$@")
  if [[ $dry_run ]]; then echo "+ $words"; return; fi
  if [[ -z $ran && -e $result && -f $note && $(<"$note") == "$words" ]]; then echo "== $name: done, skipped"; return; fi
  echo "== $name"
  echo "+ $words"
  "$@"
  mkdir -p "$output/.stages"
  echo "$words" > "$note"
  ran=1
}
common=(--data_dir "$data" --model_name_or_path "$model" --seed "$seed")

stage downloads "$output/.stages/downloads" \
  python prepare_data.py --download_only --model_name_or_path "$model" --encoder "$encoder"
if [[ $movielens ]]; then
  stage prepare_data "$data/run.json" python prepare_data.py --dataset movielens --output_dir "$data" --seed "$seed"
fi

stage sft "$output/sft/final_model" \
  python sft_smol.py "${common[@]}" --output_dir "$output/sft" \
  --max_train_samples "$train" --max_eval_samples "$valid"

stage negatives "$negatives/data" \
  python dataset_generate_cluster_batch.py "${common[@]}" --adapter "$output/sft/final_model" \
  --output_dir "$negatives" --max_train_samples "$preferences" --max_eval_samples "$valid"

for kind in hard long_tail two_negatives; do
  stage "dpo_$kind" "$negatives/$kind/final_model" \
    python DPO_from_dpoData.py --train_data "$negatives/data/dpo_${kind}_train.json" \
    --valid_data "$negatives/data/dpo_${kind}_valid.json" --adapter "$output/sft/final_model" \
    --model_name_or_path "$model" --seed "$seed" --output_dir "$negatives/$kind"
done

evaluate() { # evaluate NAME FOLDER ADAPTER: predictions of one model, and its row in the CSV
  stage "predict_$(basename "$2")" "$2/predictions/raw_results_$test.json" \
    python generate_predict_batch.py "${common[@]}" --adapter "$3" --output_dir "$2" --max_predict_samples "$test"
  stage "evaluate_$(basename "$2")" "$2/metrics.json" \
    python evaluate.py --predictions "$2/predictions/raw_results_$test.json" --data_dir "$data" --dataset "$dataset" \
    --method "$1" --encoder "$encoder" --topk 5 10 --metrics_json "$2/metrics.json" --results_csv "$output/results.csv"
}
evaluate Origin "$output/origin" ''
evaluate SFT "$output/sft" "$output/sft/final_model"
evaluate ClusterIn "$negatives/hard" "$negatives/hard/final_model"
evaluate ClusterOut-LowExposure "$negatives/long_tail" "$negatives/long_tail/final_model"
evaluate 'Two negatives' "$negatives/two_negatives" "$negatives/two_negatives/final_model"

# -- The table --------------------------------------------------------------------------------------------------------
if [[ ! $dry_run ]]; then
  echo
  python -m cebs.results "$output/results.csv"
  echo "figures of $test test users: $output/results.csv"
fi
