// How do the pools of workers compare?

import type { Dashboard } from '@grafana/schema';
import { dashboard, type Section, series, stat } from './panels.ts';
import { grown, JOB, mean, ofWorkers, over, pooled, quantile, rate } from './query.ts';

const POOL = `${JOB}, pool`;
const WORKER = `${POOL}, instance`;

const now: Section = {
  title: 'Now',
  panels: [
    stat({
      title: 'Workers',
      description: 'Workers of each pool that answer scrapes. Fewer than the pool should have: pods that wait for a machine, or that fail; `kubectl describe` says which.',
      unit: 'none',
      lines: [{ expr: over('count', POOL, pooled('arc_build_info', 'component="worker"')), legend: '{{job}} {{pool}}' }],
      width: 8,
    }),
    stat({
      title: 'Samples per second and worker',
      description: 'Mean of each pool. All workers do the same steps, so a pool of faster devices is not faster here, it waits more: give it a larger batch.',
      unit: 'cps',
      decimals: 1,
      lines: [{ expr: over('avg', POOL, rate(pooled('arc_samples_total'))), legend: '{{job}} {{pool}}' }],
      width: 8,
    }),
    stat({
      title: 'Members that workers know',
      description: 'Workers in the job as each pool knows it. A pool that knows fewer than the others is behind or cut off.',
      unit: 'none',
      lines: [{ expr: over('min', POOL, ofWorkers(pooled('arc_members'))), legend: '{{job}} {{pool}}' }],
      width: 8,
    }),
  ],
};

const device: Section = {
  title: 'Time on the device',
  panels: [
    series({
      title: 'Step by phase and pool',
      description:
        'Mean seconds of compute, compress, wait and update. The pool with the most compute and the least wait is the one that all others wait for: give it smaller batches or better machines.',
      unit: 's',
      min: 0,
      lines: [{ expr: mean(`${POOL}, phase`, 'arc_step_phase_seconds', pooled), legend: '{{pool}} {{phase}}' }],
    }),
    series({
      title: 'Compute, each worker',
      description: 'Forward and backward, 19 of 20 steps take no longer. One worker above its pool: a throttled or shared device, or slow data.',
      unit: 's',
      min: 0,
      lines: [{ expr: quantile(0.95, WORKER, pooled('arc_step_phase_seconds_bucket', 'phase="compute"')), legend: '{{instance}}' }],
    }),
    series({
      title: 'CPU',
      description: 'Cores in use by each worker. At the limit of the container while the device waits: raise the limit, compression needs a core beside the trainer.',
      unit: 'short',
      min: 0,
      lines: [{ expr: ofWorkers(rate(pooled('process_cpu_seconds_total'))), legend: '{{instance}}' }],
    }),
    series({
      title: 'Memory',
      description: 'Resident, of the host. Feedback needs 4 bytes an element twice (residual and U), less with fewer elements to compress. Near the limit of the container: raise it.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: ofWorkers(pooled('process_resident_memory_bytes')), legend: '{{instance}}' }],
    }),
    series({
      title: 'GPU time of compression, by kernel',
      description:
        'Seconds that a GPU spends on sketches, encoding, commits and energies, per second. All zero where the CPU compresses. More than a few hundredths: other work on the GPU slows the kernels, or buckets are too small to fill it.',
      unit: 'percentunit',
      min: 0,
      lines: [{ expr: over('avg', `${POOL}, kernel`, rate(pooled('arc_device_seconds_total'))), legend: '{{pool}} {{kernel}}' }],
      width: 8,
    }),
    series({
      title: 'GPU bus',
      description:
        'Bytes that compression copies to and from a GPU, per second: what travels, the means and what was sent once more. Near the rate of the bus: the warm-up\'s dense rounds, or tensors that are averaged whole.',
      unit: 'Bps',
      min: 0,
      lines: [{ expr: over('avg', `${POOL}, direction`, rate(pooled('arc_device_copied_bytes_total'))), legend: '{{pool}} {{direction}}' }],
      width: 8,
    }),
    series({
      title: 'GPU memory of compression',
      description:
        'Feedback state (4 bytes an element with ef14, twice that with ef21, three times with ef21m) and scratch. Scratch above a bucket: dense rounds, which need more; if the GPU runs full, use ef14 or smaller buckets.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: over('max', `${POOL}, use`, pooled('arc_device_memory_bytes')), legend: '{{pool}} {{use}}' }],
      width: 8,
    }),
  ],
};

const presence: Section = {
  title: 'Coming and going',
  panels: [
    series({
      title: 'Reconnections, by shard',
      description: 'Connections to a shard that were lost and are back. All workers to one shard: that shard restarted. One worker to all shards: its link.',
      unit: 'none',
      lines: [{ expr: over('sum', `${POOL}, shard`, grown(pooled('arc_reconnects_total'))), legend: '{{job}} {{pool}} shard {{shard}}' }],
      width: 8,
    }),
    series({
      title: 'Time without a shard',
      description: 'Seconds between a connection\'s loss and its return. Above 3 s a restart of the shard takes long; look at its readiness probe and at its machine.',
      unit: 's',
      lines: [{ expr: over('max', `${POOL}, shard`, grown(pooled('arc_shard_away_seconds_total'))), legend: '{{job}} {{pool}} shard {{shard}}' }],
      width: 8,
    }),
    series({
      title: 'Joined and superseded',
      description: 'Workers that joined a running job, and those that had to join again since it had gone on without them. Superseded again and again: the worker is too slow or too often away for this job.',
      unit: 'none',
      lines: [
        { expr: over('sum', POOL, grown(pooled('arc_joins_total'))), legend: '{{job}} {{pool}} joined' },
        { expr: over('sum', POOL, grown(pooled('arc_superseded_total'))), legend: '{{job}} {{pool}} superseded' },
      ],
      width: 8,
    }),
    series({
      title: 'Steps without this worker',
      description:
        'Steps that had closed before the worker came (replayed), and steps of which some of its contributions came too late (uncounted; they stay in its residual). A pool that is always late adds nothing: wait longer for it, or leave it out.',
      unit: 'none',
      lines: [
        { expr: over('sum', POOL, grown(pooled('arc_behind_steps_total'))), legend: '{{job}} {{pool}} replayed' },
        { expr: over('sum', POOL, grown(pooled('arc_uncounted_steps_total'))), legend: '{{job}} {{pool}} uncounted' },
      ],
      width: 12,
    }),
    series({
      title: 'Step of each worker',
      description: 'Newest step. All lines lie on each other; one that lags is behind and replays, one that stands still has stopped: see its log.',
      unit: 'none',
      lines: [{ expr: ofWorkers(pooled('arc_step')), legend: '{{instance}}' }],
      width: 12,
    }),
  ],
};

const links: Section = {
  title: 'Connections to shards (QUIC)',
  panels: [
    series({
      title: 'Round trip',
      description: 'Mean of each pool to each shard. A pool whose line is far above the others is far away or behind a full link: step time cannot be below a few of these.',
      unit: 's',
      min: 0,
      lines: [{ expr: over('avg', `${POOL}, peer`, ofWorkers(pooled('arc_quic_round_trip_seconds'))), legend: '{{job}} {{pool}} shard {{peer}}' }],
      width: 8,
    }),
    series({
      title: 'Lost packets',
      description: 'Packets that workers sent and counted as lost, per second. More than one in a hundred of those sent: socket buffers, MTU or the link; the pool tells where.',
      unit: 'pps',
      min: 0,
      lines: [{ expr: over('sum', `${POOL}, peer`, ofWorkers(rate(pooled('arc_quic_lost_packets_total')))), legend: '{{job}} {{pool}} shard {{peer}}' }],
      width: 8,
    }),
    series({
      title: 'Congestion window',
      description: 'The smallest of each pool. Window over round trip is the rate that a connection reaches. If it never grows, losses keep it down.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: over('min', `${POOL}, peer`, ofWorkers(pooled('arc_quic_congestion_window_bytes'))), legend: '{{job}} {{pool}} shard {{peer}}' }],
      width: 8,
    }),
  ],
};

/** Pools beside each other. */
export function workers(): Dashboard {
  return dashboard('arc-workers', 'arc-topk: workers', 'How do the pools of workers compare?', [now, device, presence, links]);
}
