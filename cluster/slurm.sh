#!/bin/bash
# A Ray cluster inside one SLURM job, and a command on it. See slurm.md.
#   sbatch --nodes=6 cluster/slurm.sh train joint --pairs /shared/chairs ...
# The first node is the head and trains too, as do the next TRAIN_NODES - 1; the others draw.
#SBATCH --job-name=sbir-ray
#SBATCH --nodes=6
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

train_nodes=${TRAIN_NODES:-2}
port=$((20000 + SLURM_JOB_ID % 20000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# A token that only this user can read, gone with the job.
token=$(mktemp "$HOME/.sbir-ray-token.XXXXXX")
trap 'rm -f "$token"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0

# The job's cores and GPUs are Ray's; one resource says what a node is for.
start() { # NODE RESOURCE OPTION...
  local node=$1 resource=$2
  shift 2
  srun --nodes=1 --ntasks=1 --overlap --export=ALL -w "$node" \
    ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --resources="{\"$resource\": 1}" "$@" &
}

head=$(getent hosts "${nodes[0]}" | awk 'NR == 1 { print $1 }')
start "${nodes[0]}" train --head --node-ip-address="$head" --port="$port" \
  --dashboard-host=127.0.0.1
for number in "${!nodes[@]}"; do
  if ((number == 0)); then continue; fi
  resource=draw
  if ((number < train_nodes)); then resource=train; fi
  start "${nodes[$number]}" "$resource" --address="$head:$port"
done

export RAY_ADDRESS=$head:$port
# Nodes come one after another; what is still missing after that is told.
until python -c "import ray; ray.init(log_to_driver=False, logging_level='ERROR')" 2> /dev/null; do
  sleep 2
done
sbir-ray doctor --wait 300 --workers "$train_nodes" --cpus-per-worker 6 --gpu \
  --worker-resource train --actors "$((${#nodes[@]} - train_nodes))" --cpus-per-actor 4 \
  --gpus-per-actor 1 --actor-resource draw --storage "${STORAGE:-$HOME}"

# SIGTERM two minutes before the time limit reaches the command, which saves and ends.
sbir-ray "$@" &
command=$!
trap 'kill -TERM "$command" 2> /dev/null || true' TERM
code=0
wait "$command" || code=$?
# A trapped signal ends the wait, not the command.
while kill -0 "$command" 2> /dev/null; do
  code=0
  wait "$command" || code=$?
done
exit "$code"
