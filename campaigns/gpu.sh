#!/usr/bin/env bash
# The whole GPU campaign in one command, within nine minutes on one H100 or H200:
#   bash campaigns/gpu.sh
# It measures layers of GPT-2's and LLaMA's sizes and a grid of layers of d_model 1024, 2048 and
# 4096, all in bfloat16, forward, in training and decoding, and the whole GPT-2 small, and writes
# to campaigns/results/DATE-DEVICE/.
set -euo pipefail
cd "$(dirname "$0")/.."
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9' '-' |
    tr '[:upper:]' '[:lower:]' | sed 's/-*$//')
out="campaigns/results/$(date +%F)-$device"
sparseffn=${SPARSEFFN:-sparseffn}
"${PYTHON:-python}" campaigns/gpu_layers.py --out "$out/layers.json"
for d_model in 1024 2048 4096; do
    "$sparseffn" bench ffn --d-model "$d_model" --d-ff $((4 * d_model)) --tokens 16384 \
        --dtype bfloat16 --repeats 5 --no-all-plans --no-external \
        --only circulant-8 circulant-16 narrow-1/4 default-0.4 --out "$out/d$d_model"
done
"$sparseffn" bench model --size small --dtype bfloat16 --batch-size 16 --window 1024 \
    --repeats 5 --out "$out/gpt2-small"
