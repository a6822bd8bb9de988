// Do the shards keep up, and whom do they wait for?

import type { Dashboard } from '@grafana/schema';
import { dashboard, type Section, series, stat } from './panels.ts';
import { chosen, grown, JOB, ofShards, over, quantile, rate } from './query.ts';

const SHARD = `${JOB}, instance`;

const WAIT_SHARE = `${over('sum', `${SHARD}, rank`, rate(chosen('arc_straggler_wait_seconds_total')))} / ignoring (rank) group_left () ${over('sum', SHARD, rate(chosen('arc_round_seconds_sum')))}`;

const now: Section = {
  title: 'Now',
  panels: [
    stat({
      title: 'Shards',
      description: 'Shards that answer scrapes, and those that the job has. Fewer than expected: the runbook under "Shard down".',
      unit: 'none',
      lines: [
        { expr: over('count', JOB, chosen('arc_build_info', 'component="shard"')), legend: '{{job}} there' },
        { expr: over('max', JOB, chosen('arc_shards')), legend: '{{job}} expected' },
      ],
      width: 6,
    }),
    stat({
      title: 'Certificate ends in',
      description: 'Days until the first certificate of a shard or worker ends. Below 7 the shards warn too. Renew it with `arc-ps certs --renew`; nothing restarts.',
      unit: 'd',
      decimals: 0,
      limits: { bad: 3, warning: 14, below: true },
      lines: [{ expr: `(${over('min', JOB, chosen('arc_certificate_expiry_timestamp_seconds'))} - time()) / 86400`, legend: '{{job}}' }],
    }),
    stat({
      title: 'Members away',
      description: 'Workers whose connection is lost and who may come back. Rounds wait for each for a second, then go on. More than a moment: look at that worker\'s machine and link.',
      unit: 'none',
      limits: { warning: 1 },
      lines: [{ expr: over('max', JOB, chosen('arc_members_away')), legend: '{{job}}' }],
    }),
    stat({
      title: 'Members',
      description: 'Live workers as the shards see them. If shards differ for long, some worker reaches one and not the other: see its log and the network policy.',
      unit: 'none',
      lines: [
        { expr: over('max', JOB, ofShards(chosen('arc_members'))), legend: '{{job}} most' },
        { expr: over('min', JOB, ofShards(chosen('arc_members'))), legend: '{{job}} fewest' },
      ],
      width: 6,
    }),
    stat({
      title: 'Versions',
      description: 'Processes by version. Two versions for longer than a rolling upgrade takes: some pods were left behind.',
      unit: 'none',
      lines: [{ expr: over('count', 'component, version', chosen('arc_build_info')), legend: '{{component}} {{version}}' }],
    }),
  ],
};

const rounds: Section = {
  title: 'Rounds',
  panels: [
    series({
      title: 'Rounds by outcome',
      description:
        'Complete is what should be. Partial: workers were lost or late (below). Non-finite: a gradient overflowed, all skipped. Abandoned: nobody was left to answer.',
      unit: 'ops',
      min: 0,
      lines: [{ expr: over('sum', `${JOB}, outcome`, rate(chosen('arc_rounds_total'))), legend: '{{job}} {{outcome}}' }],
    }),
    series({
      title: 'Round time',
      description:
        'From a round\'s first frame to its last answer, waiting for workers included. Half take no longer than the lower line, 99 of 100 no longer than the upper. Far apart: stragglers or lost packets.',
      unit: 's',
      min: 0,
      lines: [
        { expr: quantile(0.5, SHARD, chosen('arc_round_seconds_bucket')), legend: '{{instance}} half' },
        { expr: quantile(0.99, SHARD, chosen('arc_round_seconds_bucket')), legend: '{{instance}} 99 of 100' },
      ],
    }),
    series({
      title: 'Aggregation time',
      description: 'Decoding, summing and encoding one frame. If it grows with the CPU near one core, the shard is the limit: add shards.',
      unit: 's',
      min: 0,
      lines: [
        { expr: quantile(0.5, SHARD, chosen('arc_aggregate_seconds_bucket')), legend: '{{instance}} half' },
        { expr: quantile(0.99, SHARD, chosen('arc_aggregate_seconds_bucket')), legend: '{{instance}} 99 of 100' },
      ],
    }),
    series({
      title: 'Open rounds',
      description: 'Rounds that wait for contributions. It goes up and down with each step. A line that stays up: somebody does not send; see "Waiting for one worker".',
      unit: 'none',
      min: 0,
      lines: [{ expr: chosen('arc_open_rounds'), legend: '{{instance}}' }],
      width: 8,
    }),
    series({
      title: 'Memory for rounds',
      description:
        'Contributions that wait for those of lower ranks (parked), and answers kept for workers that come late. Both are bounded by the plan; if they are most of the memory, use more shards.',
      unit: 'bytes',
      min: 0,
      lines: [
        { expr: chosen('arc_parked_bytes'), legend: '{{instance}} parked' },
        { expr: chosen('arc_retained_bytes'), legend: '{{instance}} kept' },
      ],
      width: 8,
    }),
    series({
      title: 'Payload by shard',
      description: 'Bytes a second in both directions. One shard far above the others: a tensor that cannot be split lies there; use fewer shards, or accept it.',
      unit: 'Bps',
      min: 0,
      lines: [
        { expr: over('sum', `${SHARD}, direction`, ofShards(rate(chosen('arc_communication_bytes_total')))), legend: '{{instance}} {{direction}}' },
      ],
      width: 8,
    }),
  ],
};

const stragglers: Section = {
  title: 'Waiting and stragglers',
  panels: [
    series({
      title: 'Waiting for one worker, by rank',
      description:
        'Share of the rounds\' time in which only this worker was missing, on the shard where it is most. One rank on top for long is a straggler: its device is slower or shared, its link worse. Changing ranks are noise, and so is most of very short rounds: the alert also asks for a tenth of the steps\' time.',
      unit: 'percentunit',
      min: 0,
      limits: { warning: 0.5 },
      lines: [{ expr: `topk(10, ${over('max', `${JOB}, rank`, WAIT_SHARE)})`, legend: '{{job}} rank {{rank}}' }],
      width: 8,
    }),
    series({
      title: 'Late contributions, by rank',
      description:
        'Contributions to rounds that had closed without them: lost connections, or --quorum with a worker slower than --straggler-timeout-seconds. They stay in that worker\'s residual. A rank that is always late trains nobody: remove it or wait longer.',
      unit: 'none',
      lines: [{ expr: `topk(10, ${over('sum', `${JOB}, rank`, grown(chosen('arc_late_contributions_total')))})`, legend: '{{job}} rank {{rank}}' }],
      width: 8,
    }),
    series({
      title: 'Lateness',
      description: 'By how much late contributions missed their round; half and 95 of 100. Just above nothing: a slightly longer --straggler-timeout-seconds would count them.',
      unit: 's',
      min: 0,
      lines: [
        { expr: quantile(0.5, JOB, chosen('arc_lateness_seconds_bucket')), legend: '{{job}} half' },
        { expr: quantile(0.95, JOB, chosen('arc_lateness_seconds_bucket')), legend: '{{job}} 95 of 100' },
      ],
      width: 8,
    }),
    series({
      title: 'Persistent stragglers',
      description: 'Ranks that were late in most of their latest rounds. Any line here needs a look: the runbook under "Straggler".',
      unit: 'none',
      lines: [{ expr: over('max', `${JOB}, rank`, chosen('arc_persistent_straggler')), legend: '{{job}} rank {{rank}}' }],
      width: 8,
    }),
    series({
      title: 'Workers that come and go',
      description:
        'Lost, back again, joined while the job ran, told to join again (superseded). Bursts of lost ones at once point to the network or to preemption; superseded ones were away for more than 8 steps.',
      unit: 'none',
      lines: [
        { expr: over('max', JOB, grown(chosen('arc_lost_workers_total'))), legend: '{{job}} lost' },
        { expr: over('max', JOB, grown(chosen('arc_returned_workers_total'))), legend: '{{job}} back' },
        { expr: over('max', JOB, grown(chosen('arc_joined_workers_total'))), legend: '{{job}} joined' },
        { expr: over('max', JOB, grown(chosen('arc_superseded_workers_total'))), legend: '{{job}} superseded' },
      ],
      width: 8,
    }),
    series({
      title: 'Membership',
      description: 'Version of the list of members: a step up for each change. Climbing without end: a worker is restarted again and again; look at its log.',
      unit: 'none',
      lines: [{ expr: over('max', JOB, chosen('arc_epoch')), legend: '{{job}}' }],
      width: 8,
    }),
  ],
};

const process: Section = {
  title: 'Process',
  panels: [
    series({
      title: 'CPU',
      description: 'Cores in use. One core does the sums, others the encryption. Near the limit of the container: raise it; near one core in sums with long aggregation: add shards.',
      unit: 'short',
      min: 0,
      lines: [{ expr: ofShards(rate(chosen('process_cpu_seconds_total'))), legend: '{{instance}}' }],
      width: 8,
    }),
    series({
      title: 'Memory',
      description: 'Resident. It levels off after some steps. Near the limit of the container: raise it, or use more shards (each holds its share). With snapshots in memory they count too: give --snapshot-dir.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: ofShards(chosen('process_resident_memory_bytes')), legend: '{{instance}}' }],
      width: 8,
    }),
    series({
      title: 'Recoveries',
      description:
        'Times that a shard, just started, was told of a running job, and results that it took over. Each is a restart of the shard: see why it died. A recovery takes about as long as workers need to dial it.',
      unit: 'none',
      lines: [
        { expr: over('sum', SHARD, grown(chosen('arc_recoveries_total'))), legend: '{{instance}} recoveries' },
        { expr: over('sum', SHARD, grown(chosen('arc_adopted_results_total'))), legend: '{{instance}} results' },
      ],
      width: 8,
    }),
    series({
      title: 'Recovery time',
      description: 'From the first worker that told of the job until rounds were formed again. Above 3 s: some worker could not reach the shard in time.',
      unit: 's',
      min: 0,
      lines: [{ expr: quantile(0.95, JOB, chosen('arc_recovery_seconds_bucket')), legend: '{{job}}' }],
      width: 8,
    }),
    series({
      title: 'Refused peers',
      description:
        'Peers refused by code, and connections that failed in the TLS handshake. World or plan: a worker with other settings, whose log names the first difference. Handshakes: a wrong or expired certificate, or somebody who should not be there.',
      unit: 'none',
      lines: [
        { expr: over('sum', `${JOB}, code`, grown(chosen('arc_refusals_total'))), legend: '{{job}} {{code}}' },
        { expr: over('sum', JOB, grown(chosen('arc_failed_handshakes_total'))), legend: '{{job}} handshake' },
      ],
      width: 8,
    }),
    series({
      title: 'Certificate renewals',
      description: 'Changes of the certificate files. Refused: the new files do not fit together or to the authority, and the old ones stay in use; the shard\'s log says what is wrong.',
      unit: 'none',
      lines: [{ expr: over('sum', `${JOB}, outcome`, grown(chosen('arc_certificate_renewals_total'))), legend: '{{job}} {{outcome}}' }],
      width: 8,
    }),
  ],
};

const links: Section = {
  title: 'Connections to workers (QUIC)',
  panels: [
    series({
      title: 'Round trip',
      description: 'The ten slowest, by rank. Far above the ping between the machines: queues fill on the way; see losses and the rate of the link.',
      unit: 's',
      min: 0,
      lines: [{ expr: `topk(10, ${ofShards(chosen('arc_quic_round_trip_seconds'))})`, legend: '{{instance}} rank {{peer}}' }],
      width: 8,
    }),
    series({
      title: 'Lost packets',
      description:
        'Packets that a shard sent and counted as lost, per second. Some are how the rate is found. More than one in a hundred: too small socket buffers (sysctl net.core.rmem_max), a wrong MTU, or a bad link.',
      unit: 'pps',
      min: 0,
      lines: [{ expr: `topk(10, ${ofShards(rate(chosen('arc_quic_lost_packets_total')))})`, legend: '{{instance}} rank {{peer}}' }],
      width: 8,
    }),
    series({
      title: 'Congestion window',
      description: 'The ten smallest. Window over round trip is the rate that a connection reaches. One that stays at a few packets sees losses all the time.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: `bottomk(10, ${ofShards(chosen('arc_quic_congestion_window_bytes'))})`, legend: '{{instance}} rank {{peer}}' }],
      width: 8,
    }),
  ],
};

const store: Section = {
  title: 'Snapshot store',
  panels: [
    series({
      title: 'Snapshots held',
      description: 'Snapshots of which a shard holds pieces: those kept, and one that comes. Shards that differ for long: one lacks pieces, and the job would go on from an older snapshot.',
      unit: 'none',
      min: 0,
      lines: [{ expr: chosen('arc_snapshots'), legend: '{{instance}}' }],
      width: 8,
    }),
    series({
      title: 'Bytes held',
      description: 'Of snapshots, on the disk or in memory. Near --snapshot-limit-bytes the next one is refused: raise it, or keep fewer.',
      unit: 'bytes',
      min: 0,
      lines: [{ expr: chosen('arc_snapshot_bytes'), legend: '{{instance}}' }],
      width: 8,
    }),
    series({
      title: 'Requests that were not done',
      description: 'Refused: against a rule or the limit of bytes. Failed: the disk, or the peer went. A disk that fails shows in the shard\'s log.',
      unit: 'none',
      lines: [
        {
          expr: over('sum', `${JOB}, request, outcome`, grown(chosen('arc_snapshot_requests_total', 'outcome!="done"'))),
          legend: '{{job}} {{request}} {{outcome}}',
        },
      ],
      width: 8,
    }),
    series({
      title: 'Transfer',
      description: 'Bytes of snapshots a second, up to the shards and down to workers that join or resume. If step times rise with it, ask for fewer snapshots.',
      unit: 'Bps',
      min: 0,
      lines: [{ expr: over('sum', `${JOB}, direction`, rate(chosen('arc_snapshot_transfer_bytes_total'))), legend: '{{job}} {{direction}}' }],
      width: 12,
    }),
  ],
};

/** Rounds, waiting, processes, connections, snapshots. */
export function shards(): Dashboard {
  return dashboard('arc-shards', 'arc-topk: shards', 'Do the shards keep up, and whom do they wait for?', [
    now,
    rounds,
    stragglers,
    process,
    links,
    store,
  ]);
}
