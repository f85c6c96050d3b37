# The stages as they were typed, written as a script afterwards. As goodreads_series_negatives, with seed 0: the recipe's SFT, and ClusterIn without volumes of a series of the history
data=sampled_data/goodreads_series out=output/lev limits="--max_train_samples 256 --max_eval_samples 64"
beams="--max_predict_samples 250 --decoding constrained_beam --num_beams 20 --calibration 0.4 --renormalize --exclude_history"
evaluate() { python evaluate.py --predictions "$1/predictions" --data_dir $data --dataset goodreads_series --method "$2" --encoder paraphrase-MiniLM-L3-v2 --metrics_json "$1/metrics.json" --results_csv output/neg_seed_0/results.csv --topk 5 10 --exclude_history --reference SFT; }
python sft_smol.py --config configs/sft_recipe.yaml --data_dir $data --renormalize --output_dir $out/seed_0 --seed 0
python dataset_generate_cluster_batch.py --candidate_source topk --constrained --data_dir $data --seed 0 --adapter $out/seed_0/final_model --output_dir $out/candidates_seed_0 $limits
python dataset_generate_cluster_batch.py --negatives in:first --same_series drop --candidates $out/candidates_seed_0/data/candidates.json --data_dir $data --output_dir $out/spared_seed_0 --seed 0 $limits
python DPO_from_dpoData.py --renormalize --data_dir $data --train_data $out/spared_seed_0/data/negatives_train.json --valid_data $out/spared_seed_0/data/negatives_valid.json --adapter $out/seed_0/final_model --output_dir $out/in_spared_seed_0 --seed 0 --learning_rate 5e-4
python generate_predict_batch.py --data_dir $data --seed 0 --adapter $out/seed_0/final_model --output_dir output/neg_seed_0/sft $beams
python generate_predict_batch.py --data_dir $data --seed 0 --adapter $out/in_spared_seed_0/final_model --output_dir output/neg_seed_0/clusterin_spared $beams
evaluate output/neg_seed_0/sft SFT
evaluate output/neg_seed_0/clusterin_spared "ClusterIn, no series"
python -m cebs.results output/neg_seed_0/results.csv --reference SFT
