// Does the job learn, and how fast?

import type { Dashboard } from '@grafana/schema';
import { dashboard, type Section, series, stat } from './panels.ts';
import { chosen, grown, JOB, mean, ofShards, over, pooled, quantile, rate } from './query.ts';

const now: Section = {
  title: 'Now',
  panels: [
    stat({
      title: 'Step',
      description: 'The newest step that any worker reported. If it stands still, see the runbook under "Training stalled".',
      unit: 'none',
      lines: [{ expr: over('max', JOB, ofShards(chosen('arc_step'))), legend: '{{job}}' }],
    }),
    stat({
      title: 'Steps per second',
      description:
        'Updates that a worker applies a second. If it falls: "Step time by phase" below says which phase grew. Zero with members there is a stall.',
      unit: 'ops',
      decimals: 2,
      lines: [{ expr: over('max', JOB, rate(pooled('arc_steps_total', 'outcome="applied"'))), legend: '{{job}}' }],
    }),
    stat({
      title: 'Training loss',
      description: 'Mean of the workers\' latest losses. NaN or a jump upwards: look at the gradient norm and at skipped steps, and lower the learning rate.',
      unit: 'short',
      decimals: 4,
      lines: [{ expr: over('max', JOB, ofShards(chosen('arc_training_loss'))), legend: '{{job}}' }],
    }),
    stat({
      title: 'Members',
      description:
        'Workers that are connected now, and those the job started with. Fewer than expected: the workers dashboard shows which pool lost some; the log of shard 0 says why.',
      unit: 'none',
      lines: [
        { expr: over('max', JOB, ofShards(chosen('arc_members'))), legend: '{{job}} now' },
        { expr: over('max', JOB, chosen('arc_world_size')), legend: '{{job}} at the start' },
      ],
      width: 6,
    }),
    stat({
      title: 'Comparisons that differed',
      description:
        'Comparisons of the workers\' parameters, in the chosen time, in which not all were the same. Must be 0. If not: the runbook under "Replicas differ".',
      unit: 'none',
      limits: { bad: 1 },
      lines: [
        { expr: over('max', JOB, ofShards(`increase(${chosen('arc_digest_mismatches_total')}[$__range])`)), legend: '{{job}}' },
      ],
      width: 6,
    }),
  ],
};

const loss: Section = {
  title: 'Loss',
  panels: [
    series({
      title: 'Loss',
      description:
        'Training loss (mean of the workers\' latest) and validation loss. Should fall and then level off. Validation rising while training falls: overfitting. ' +
        'Both worse than dense training of the same steps: raise --density, or try values in bf16.',
      unit: 'short',
      lines: [
        { expr: over('max', JOB, ofShards(chosen('arc_training_loss'))), legend: '{{job}} training' },
        { expr: over('max', JOB, `${pooled('arc_validation_loss')} > 0`), legend: '{{job}} validation' },
      ],
    }),
    series({
      title: 'Gradient norm',
      description:
        'Norm of each worker\'s own gradient, mean and most of a pool. One worker far above the others: its data is unlike theirs, or its device computes wrongly. All rising: lower the learning rate or clip.',
      unit: 'short',
      lines: [
        { expr: over('avg', `${JOB}, pool`, pooled('arc_gradient_norm')), legend: '{{job}} {{pool}} mean' },
        { expr: over('max', `${JOB}, pool`, pooled('arc_gradient_norm')), legend: '{{job}} {{pool}} most' },
      ],
    }),
    series({
      title: 'Learning rate',
      description: 'Of the latest step. It must be the same on all workers: a second line means that one runs with another schedule; compare their flags.',
      unit: 'short',
      lines: [
        { expr: over('max', JOB, pooled('arc_learning_rate')), legend: '{{job}} highest' },
        { expr: over('min', JOB, pooled('arc_learning_rate')), legend: '{{job}} lowest' },
      ],
    }),
    series({
      title: 'Steps by outcome',
      description:
        'Applied, or skipped because some worker\'s gradient was not finite. A few skipped at the start with float16 are usual; a constant share means that a loss overflows: lower the learning rate or the loss scale.',
      unit: 'ops',
      lines: [{ expr: over('sum', `${JOB}, outcome`, rate(pooled('arc_steps_total'))), legend: '{{job}} {{outcome}}' }],
    }),
  ],
};

const speed: Section = {
  title: 'Speed',
  panels: [
    series({
      title: 'Step time by phase',
      description:
        'Mean seconds of a step: compute (forward and backward), compress, wait (for shards after the last gradient), update. ' +
        'Wait grew: see communication (bytes, round trips) and shards (stragglers). Compute grew: data loading or a throttled device. Compress grew: too few threads beside the trainer.',
      unit: 's',
      stacked: true,
      min: 0,
      lines: [{ expr: mean('phase', 'arc_step_phase_seconds', pooled), legend: '{{phase}}' }],
    }),
    series({
      title: 'Step time',
      description:
        'Half of the steps, and 19 of 20, take no longer. If the upper line lies far above the lower one, steps wait for something irregular: stragglers, checkpoints, validation, lost packets.',
      unit: 's',
      min: 0,
      lines: [
        { expr: quantile(0.5, `${JOB}, pool`, pooled('arc_step_seconds_bucket')), legend: '{{job}} {{pool}} half' },
        { expr: quantile(0.95, `${JOB}, pool`, pooled('arc_step_seconds_bucket')), legend: '{{job}} {{pool}} 19 of 20' },
      ],
    }),
    series({
      title: 'Samples per second',
      description:
        'Tokens or images of all workers. It should grow with the number of workers. If it does not: the share of waiting beside this tells whether the network is in the way.',
      unit: 'cps',
      min: 0,
      stacked: true,
      lines: [{ expr: over('sum', `${JOB}, pool`, rate(pooled('arc_samples_total'))), legend: '{{job}} {{pool}}' }],
    }),
    series({
      title: 'Share of time spent waiting',
      description:
        'Wait over the whole step. Above a half, machines idle for the network or for stragglers: a lower density, more shards or a larger batch per step (accumulation) helps.',
      unit: 'percentunit',
      min: 0,
      max: 1,
      limits: { warning: 0.5 },
      lines: [
        {
          expr: `${over('sum', `${JOB}, pool`, rate(pooled('arc_step_phase_seconds_sum', 'phase="wait"')))} / ${over('sum', `${JOB}, pool`, rate(pooled('arc_step_seconds_sum')))}`,
          legend: '{{job}} {{pool}}',
        },
      ],
    }),
  ],
};

const snapshots: Section = {
  title: 'Snapshots of the workers',
  panels: [
    series({
      title: 'Snapshots by outcome',
      description:
        'Snapshots that were due. Skipped: the one before was still being uploaded, so ask for them less often. Failed: a shard\'s store was not reached or refused; the worker\'s log says which.',
      unit: 'none',
      lines: [{ expr: over('sum', `${JOB}, outcome`, grown(pooled('arc_snapshots_total'))), legend: '{{job}} {{outcome}}' }],
      width: 8,
    }),
    series({
      title: 'Upload time',
      description: 'Of a snapshot\'s part, 19 of 20 take no longer. It runs beside training; if it comes near the interval between snapshots, ask for fewer.',
      unit: 's',
      min: 0,
      lines: [{ expr: quantile(0.95, `${JOB}, pool`, pooled('arc_snapshot_upload_seconds_bucket')), legend: '{{job}} {{pool}}' }],
      width: 8,
    }),
    series({
      title: 'Upload rate',
      description: 'Bytes of snapshots a second. If step times rise whenever this does, snapshots take the bandwidth of training: ask for fewer.',
      unit: 'Bps',
      min: 0,
      lines: [{ expr: over('sum', `${JOB}, pool`, rate(pooled('arc_snapshot_uploaded_bytes_total'))), legend: '{{job}} {{pool}}' }],
      width: 8,
    }),
  ],
};

/** Loss, steps, speed. */
export function training(): Dashboard {
  return dashboard('arc-training', 'arc-topk: training', 'Does the job learn, and how fast?', [now, loss, speed, snapshots]);
}
