// What travels, and is it worth it?

import type { Dashboard } from '@grafana/schema';
import { dashboard, type Section, series, stat } from './panels.ts';
import { chosen, JOB, ofShards, ofWorkers, over, pooled, rate } from './query.ts';

/** By the shards' account, which knows every kind of worker, also those without metrics of their own. */
function moved(labels: string, matchers = ''): string {
  return over('sum', labels, ofShards(rate(chosen('arc_communication_bytes_total', matchers))));
}

function dense(labels: string, matchers = ''): string {
  return over('sum', labels, ofShards(rate(chosen('arc_dense_equivalent_bytes_total', matchers))));
}

function waiting(phase: string): string {
  return over('sum', `${JOB}, pool`, rate(pooled('arc_step_phase_seconds_sum', `phase="${phase}"`)));
}

const now: Section = {
  title: 'Now',
  panels: [
    stat({
      title: 'Fewer bytes than dense f32',
      description:
        'How many times more dense f32 would move for the same rounds. It is low in the warm-up, which is dense. If it stays low: is --density higher than meant, or are most tensors one-dimensional (those travel whole)?',
      unit: 'suffix:×',
      decimals: 1,
      limits: { bad: 1, warning: 2, below: true },
      lines: [{ expr: `${dense(JOB)} / ${moved(JOB)}`, legend: '{{job}}' }],
      width: 6,
    }),
    stat({
      title: 'Captured energy',
      description:
        'Share of the squared norm that the chosen rows hold, mean over shards. Much above the density is good. If it comes near the density, the choice is no better than chance: raise --density or --sketch-rank. Near --energy, where that is below 1: fewer rows than the density allows hold it.',
      unit: 'percentunit',
      decimals: 1,
      lines: [{ expr: over('avg', JOB, ofShards(`${chosen('arc_captured_energy_ratio')} > 0`)), legend: '{{job}}' }],
      width: 6,
    }),
    stat({
      title: 'Density',
      description:
        'Share of the compressible elements that travelled in the latest round. 100 % in the warm-up, then what --density says; with an --energy below 1 at most that, and less where fewer rows hold the energy.',
      unit: 'percentunit',
      decimals: 1,
      lines: [{ expr: over('avg', JOB, ofShards(`${chosen('arc_density_ratio')} > 0`)), legend: '{{job}}' }],
      width: 6,
    }),
    stat({
      title: 'Residual now',
      description: 'Norm of what feedback holds back over that of the gradient. It grows after the warm-up and levels off. See the panel below.',
      unit: 'suffix:×',
      decimals: 2,
      lines: [{ expr: over('max', JOB, ofShards(chosen('arc_residual_gradient_ratio'))), legend: '{{job}}' }],
      width: 6,
    }),
  ],
};

const bytes: Section = {
  title: 'Bytes',
  panels: [
    series({
      title: 'Up, by kind',
      description:
        'Payload from workers to shards. Dense stays high after the warm-up: large tensors are not compressed, compare `arc-worker plan`. Sketches near the values: a lower --sketch-rank would do.',
      unit: 'Bps',
      stacked: true,
      min: 0,
      lines: [{ expr: moved('kind', 'direction="up"'), legend: '{{kind}}' }],
    }),
    series({
      title: 'Down, by kind',
      description:
        'Payload from shards to workers. Values far above those that go up: the way down has another type (--wire-down), or ef21 needs f32 there.',
      unit: 'Bps',
      stacked: true,
      min: 0,
      lines: [{ expr: moved('kind', 'direction="down"'), legend: '{{kind}}' }],
    }),
    series({
      title: 'Share of dense f32',
      description:
        'Bytes moved over the bytes that dense f32 would move. About a quarter in the int8 warm-up, a few per cent after it. Above a half, compression does not pay: the runbook says what to look at.',
      unit: 'percentunit',
      min: 0,
      limits: { warning: 0.5 },
      lines: [{ expr: `${moved(`${JOB}, direction`)} / ${dense(`${JOB}, direction`)}`, legend: '{{job}} {{direction}}' }],
    }),
    series({
      title: 'UDP bytes over payload',
      description:
        'What the sockets carry for each byte of payload: headers, acknowledgements, retransmissions, snapshots. 1.03 to 1.2 is usual. Higher: packets are lost (shards dashboard), or rounds are so small that headers count.',
      unit: 'suffix:×',
      decimals: 2,
      lines: [
        {
          expr: `${over('sum', `${JOB}, direction`, ofShards(rate(chosen('arc_quic_udp_bytes_total'))))} / ${moved(`${JOB}, direction`)}`,
          legend: '{{job}} {{direction}}',
        },
      ],
    }),
    series({
      title: 'Payload by pool',
      description:
        'What each pool sends and receives, by the workers\' own account. A pool behind a slow link with as many bytes as the others is what makes all wait: see its round trips on the workers dashboard.',
      unit: 'Bps',
      min: 0,
      lines: [
        {
          expr: over('sum', `${JOB}, pool, direction`, ofWorkers(rate(pooled('arc_communication_bytes_total')))),
          legend: '{{job}} {{pool}} {{direction}}',
        },
      ],
    }),
    series({
      title: 'Does it pay?',
      description:
        'Seconds of compression in each second of training, and the seconds of waiting that it saves: waiting × (dense bytes / bytes − 1), at the rate that is seen now. ' +
        'Compression above what it saves: the network is fast enough for a higher density, or for dense training.',
      unit: 'percentunit',
      min: 0,
      lines: [
        { expr: waiting('compress'), legend: '{{job}} {{pool}} compressing' },
        {
          expr: `${waiting('wait')} * (${over('sum', `${JOB}, pool`, ofWorkers(rate(pooled('arc_dense_equivalent_bytes_total'))))} / ${over('sum', `${JOB}, pool`, ofWorkers(rate(pooled('arc_communication_bytes_total'))))} - 1)`,
          legend: '{{job}} {{pool}} saved',
        },
      ],
    }),
  ],
};

const quality: Section = {
  title: 'What compression leaves out',
  panels: [
    series({
      title: 'Captured energy and density',
      description:
        'The chosen rows hold this share of the gradient\'s energy, and are this share of its elements. The further apart the better. Captured energy sinking over hours: gradients have become flat; raise --density towards the end of training. With an --energy below 1 the density moves: down where few rows hold that share, up to --density where gradients are flat.',
      unit: 'percentunit',
      min: 0,
      max: 1,
      lines: [
        { expr: over('avg', JOB, ofShards(chosen('arc_captured_energy_ratio'))), legend: '{{job}} energy' },
        { expr: over('avg', JOB, ofShards(chosen('arc_density_ratio'))), legend: '{{job}} density' },
      ],
    }),
    series({
      title: 'Residual over gradient',
      description:
        'Norm of what is held back over the gradient\'s, mean and most of each pool. It should level off. If it grows without end, too little is sent, or one worker is not counted (late contributions on the shards dashboard): the runbook under "Residual growing".',
      unit: 'suffix:×',
      min: 0,
      lines: [
        { expr: over('avg', `${JOB}, pool`, ofWorkers(pooled('arc_residual_gradient_ratio'))), legend: '{{job}} {{pool}} mean' },
        { expr: over('max', `${JOB}, pool`, ofWorkers(pooled('arc_residual_gradient_ratio'))), legend: '{{job}} {{pool}} most' },
      ],
    }),
  ],
};

/** Bytes, ratios, residuals. */
export function communication(): Dashboard {
  return dashboard('arc-communication', 'arc-topk: communication', 'What travels, and is it worth it?', [now, bytes, quality]);
}
