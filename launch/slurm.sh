#!/bin/bash
# Two machines of eight GPUs under slurm:
#
#   sbatch launch/slurm.sh recipe=hunyuan_4x data.path=FOLDER parallel.sequence=8 parallel.engine=fsdp2
#
# For more machines: sbatch --nodes=N. The run folder and the cache must lie where all machines see them.
#
# srun itself starts one process for each GPU, so that every process gets the signal that comes ten
# minutes before the time limit, or at a preemption. The run then finishes its step, saves and exits
# with 75, and the job is queued again. If a process dies, the others notice and end by themselves;
# srun ends those that are left a minute after the first has ended. --kill-on-bad-exit=0 keeps srun
# from doing so at once: it would kill the last of the processes that exit with 75, and the job would
# end with the exit code of that.
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
