#!/bin/bash
# Two machines of eight GPUs under slurm; the command that uses it:
#
#   sbatch launch/slurm.sh recipe=hunyuan_4x data.path=FOLDER parallel.sequence=8 parallel.engine=fsdp2
#
# More machines: sbatch --nodes=N. One process a GPU, started by srun itself: the signal that comes ten
# minutes before the time limit reaches every process, the run finishes its step, saves and exits with
# 75, and the job is queued again; so it is after a preemption. A process that dies ends all others:
# they notice by themselves, and what is left a minute after the first has ended, srun ends. Not at
# once (--kill-on-bad-exit): of processes that end with 75 the last would be killed, and the job would
# end with that.
# The run folder must lie where all machines see it; the cache too.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec python train.py "$@"
' longreel "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
