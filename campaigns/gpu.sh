#!/usr/bin/env bash
# The whole GPU campaign in one command, within nine minutes on one H100 or H200:
#   bash campaigns/gpu.sh
# It measures layers of GPT-2's and LLaMA's sizes, all in bfloat16, forward, in training and
# decoding, and training steps of the whole GPT-2 small, each beside what is estimated from the same
# program, and writes to campaigns/results/DATE-DEVICE/.
set -euo pipefail
cd "$(dirname "$0")/.."
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9' '-' |
    tr '[:upper:]' '[:lower:]' | sed 's/-*$//')
out="campaigns/results/$(date +%F)-$device"
"${PYTHON:-python}" campaigns/gpu_layers.py --out "$out/layers.json"
"${PYTHON:-python}" campaigns/gpu_step.py --out "$out/gpt2_small.json"
