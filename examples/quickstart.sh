#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train, score and generate on a real genome with the documented commands: phage lambda, 48,502 bases. About five minutes
# on two CPU cores. Run it by `make quickstart`, which builds the environment first; all results go to ./quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=quickstart
WINDOW=1000 # bases per document; a training sample holds 1,024 tokens of consecutive documents
STEPS=120

step() { printf '\n== %s\n' "$1"; }
run() { printf '$ %s\n' "$*" && "$@"; }

if ! command -v train_evo2 > /dev/null; then
    echo "quickstart.sh: error: no train_evo2 on the path; run 'make quickstart' or 'source ./.ci_test_env.sh'" >&2
    exit 2
fi
if [[ -e $OUT ]]; then
    echo "Removing ./$OUT, the results of an earlier run"
    rm -rf "$OUT"
fi
mkdir "$OUT"

step "1/6 FASTA to training data: both strands, one block of the genome held out"
cat > "$OUT/preprocess.yaml" << YAML
- datapaths: [examples/data/lambda_phage.fa]
  output_dir: $OUT/data
  output_prefix: lambda
  split_window_length: $WINDOW
  train_split: 0.8
  valid_split: 0.2
  test_split: 0.0
  embed_reverse_complement: true
  seed: 0
YAML
run preprocess_evo2 --config "$OUT/preprocess.yaml"
HELD_OUT=$OUT/data/lambda_nucleotide_fast_tokenizer_256_val
run python examples/quickstart_windows.py "$HELD_OUT" "$OUT/held_out.fa"

step "2/6 the model before training: one step, whose learning rate is 0"
cat > "$OUT/dataset.yaml" << YAML
- {dataset_split: train, dataset_weight: 1.0, dataset_prefix: ${HELD_OUT%_val}_train}
- {dataset_split: validation, dataset_weight: 1.0, dataset_prefix: $HELD_OUT}
- {dataset_split: test, dataset_weight: 1.0, dataset_prefix: $HELD_OUT}
YAML
TRAIN=(train_evo2 --model-size evo2_tiny --dataset-config "$OUT/dataset.yaml" --result-dir "$OUT" --experiment-name run
    --seq-length 1024 --micro-batch-size 8 --global-batch-size 8 --max-steps "$STEPS"
    --lr 0.003 --min-lr 0.0003 --warmup-steps 10 --constant-steps 0 --wd 0.1 --hidden-dropout 0.1
    --eval-interval 15 --eval-iters 2 --no-activation-checkpointing --workers 0)
run "${TRAIN[@]}" --early-stop-on-step 1
PREDICT=(predict_evo2 --fasta "$OUT/held_out.fa" --ckpt-dir "$OUT/run/checkpoints" --output-log-prob-seqs
    --prepend-bos --micro-batch-size 4)
run "${PREDICT[@]}" --output-dir "$OUT/before"

step "3/6 training: the same command again goes on from there"
run "${TRAIN[@]}"

step "4/6 scoring the held-out windows"
run "${PREDICT[@]}" --output-dir "$OUT/after"

step "5/6 generating"
PROMPT=$(sed -n 2p "$OUT/held_out.fa")
run infer_evo2 --ckpt-dir "$OUT/run/checkpoints" --prompt "${PROMPT:0:256}" --max-new-tokens 240 --seed 0 \
    --output-file "$OUT/generated.jsonl"

step "6/6 result"
python examples/quickstart_report.py "$OUT"
