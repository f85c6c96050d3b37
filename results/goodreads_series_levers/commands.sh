# The stages as they were typed, one by one, written as a script afterwards; OMP_NUM_THREADS=1 each, two commands side by side on one AMD EPYC (Zen 5, bfloat16)
data=sampled_data/goodreads_series valid=sampled_data/goodreads_series_valid out=output/lev sft=output/B/final_model
limits="--max_train_samples 256 --max_eval_samples 64"
sft() { python sft_smol.py --config configs/sft_recipe.yaml --data_dir $data --renormalize "$@"; }
average() { python average_adapters.py --adapters "${@:2}" --output_dir "$1"; }
choose() { python dataset_generate_cluster_batch.py --data_dir $data $limits --output_dir "$1" --candidates "$2/data/candidates.json" --negatives "${@:3}"; }
dpo() { python DPO_from_dpoData.py --renormalize --data_dir $data --adapter $sft --learning_rate 5e-4 --output_dir "$1" --train_data "$2_train.json" --valid_data "$2_valid.json"; }
rank() {   # what, its name in the table, the model
  python generate_predict_batch.py --data_dir $valid --output_dir "$out/rank_$1" --decoding constrained_beam --num_beams 20 --calibration 0.4 --renormalize --exclude_history "${@:3}"
  python evaluate.py --predictions "$out/rank_$1/predictions" --data_dir $valid --dataset "goodreads_series validation" --method "$2" --encoder paraphrase-MiniLM-L3-v2 --metrics_json "$out/rank_$1/metrics.json" --results_csv $out/results.csv --topk 10 --exclude_history --reference "the recipe"
}

# The validation records in place of the test records
python prepare_data.py --dataset folder --source sampled_data/goodreads --series_first
mkdir -p $valid && cp $data/*.json $valid && cp $data/valid_sample.json $valid/test_sample.json

# Training
sft --output_dir output/B
sft --output_dir $out/seed_0 --seed 0
sft --output_dir $out/qv --lora_target_modules q_proj v_proj
sft --output_dir $out/full --use_peft false --learning_rate 1e-4
sft --output_dir $out/dropout --copies_per_record 3 --history_dropout 0.3 --num_train_epochs 1 --eval_strategy steps --eval_steps 256 --save_strategy steps --save_steps 256
average $out/epochs output/B/checkpoint-{256,512,768}
average $out/seeds $sft $out/seed_0/final_model
rank sft "the recipe" --adapter $sft
rank seed_0 "seed 0" --adapter $out/seed_0/final_model
rank qv "adapter on q_proj, v_proj" --adapter $out/qv/final_model
rank full "all weights" --model_name_or_path $out/full/final_model
rank dropout "history dropout" --adapter $out/dropout/final_model
rank epochs "epochs averaged" --adapter $out/epochs/final_model
rank seeds "seeds averaged" --adapter $out/seeds/final_model
rank width_40 "40 beams" --adapter $sft --num_beams 40
python benchmarks/loss_by_token.py --adapter $out/epochs/final_model --data_dir $data

# Negatives: sampled candidates, and calibrated beams
python dataset_generate_cluster_batch.py --candidate_source topk --constrained --data_dir $data --adapter $sft --output_dir output/neg/candidates/sampled $limits
python dataset_generate_cluster_batch.py --candidate_source beam --constrained --calibration 0.4 --renormalize --data_dir $data --adapter $sft --output_dir $out/candidates $limits
python dataset_generate.py --method random --num_negatives 10 --data_dir $data --output_dir $out/random_10 $limits
python dataset_generate.py --method popularity --num_negatives 10 --data_dir $data --output_dir $out/popularity_10 $limits
choose output/neg/negatives/in output/neg/candidates/sampled in:first
choose $out/spared_sampled output/neg/candidates/sampled in:first --same_series drop
choose $out/negatives_in $out/candidates in:first
choose $out/spared_candidates $out/candidates in:first --same_series drop
choose $out/beams_10 $out/candidates all:first:10 --same_series drop
dpo output/neg/clusterin output/neg/negatives/in/data/negatives
dpo $out/in_spared_sampled $out/spared_sampled/data/negatives
dpo $out/in_beams $out/negatives_in/data/negatives
dpo $out/in_spared_candidates $out/spared_candidates/data/negatives
dpo $out/sdpo_beams $out/beams_10/data/negatives
dpo $out/sdpo_random $out/random_10/data/dpo
dpo $out/sdpo_popularity $out/popularity_10/data/dpo
rank in_sampled "ClusterIn, sampled candidates" --adapter output/neg/clusterin/final_model
rank in_spared_sampled "ClusterIn, sampled, no series" --adapter $out/in_spared_sampled/final_model
rank in_beams "ClusterIn, calibrated beams" --adapter $out/in_beams/final_model
rank in_spared_candidates "ClusterIn, calibrated beams, no series" --adapter $out/in_spared_candidates/final_model
rank sdpo_beams "S-DPO K=10, calibrated beams, no series" --adapter $out/sdpo_beams/final_model
rank sdpo_random "S-DPO K=10, random" --adapter $out/sdpo_random/final_model
rank sdpo_popularity "S-DPO K=10, by popularity" --adapter $out/sdpo_popularity/final_model
python benchmarks/negatives_by_series.py --preferences output/neg/negatives/{in,self_play,random}/data/*_train.json $out/{negatives_in,spared_candidates,spared_sampled}/data/negatives_train.json
