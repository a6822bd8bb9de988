// PromQL that several dashboards need. Series are chosen by the labels of their targets, which README.md lists.

/** Labels that tell jobs apart. */
export const JOB = 'namespace, job';
const CHOSEN = 'namespace=~"$namespace",job=~"$job"';

/** Targets that `arc_build_info` calls shards. Shards and workers have many metrics in common, and one scrape job. */
const SHARDS = 'and on (namespace, job, instance) arc_build_info{component="shard"}';
const WORKERS = 'and on (namespace, job, instance) arc_build_info{component="worker"}';

function selector(name: string, labels: string, matchers: string): string {
  return `${name}{${matchers === '' ? labels : `${labels},${matchers}`}}`;
}

/** Series of the chosen jobs. */
export function chosen(name: string, matchers = ''): string {
  return selector(name, CHOSEN, matchers);
}

/** Series of the chosen jobs' workers in the chosen pools. */
export function pooled(name: string, matchers = ''): string {
  return selector(name, `${CHOSEN},pool=~"$pool"`, matchers);
}

/** Growth per second. */
export function rate(series: string): string {
  return `rate(${series}[$__rate_interval])`;
}

/** Growth within the interval that a point stands for: for events that are rare. */
export function grown(series: string): string {
  return `increase(${series}[$__rate_interval])`;
}

/** What shards say of it. */
export function ofShards(expression: string): string {
  return `(${expression} ${SHARDS})`;
}

/** What workers say of it. */
export function ofWorkers(expression: string): string {
  return `(${expression} ${WORKERS})`;
}

/** `sum by (labels) (expression)`, and its like. */
export function over(how: 'sum' | 'max' | 'min' | 'avg' | 'count', labels: string, expression: string): string {
  return `${how} by (${labels}) (${expression})`;
}

/** A quantile of a histogram, by `labels`. */
export function quantile(q: number, labels: string, buckets: string): string {
  return `histogram_quantile(${q}, ${over('sum', `${labels}, le`, rate(buckets))})`;
}

/** Mean of a histogram's values, by `labels`. */
export function mean(labels: string, name: string, choose: (name: string) => string): string {
  const part = (suffix: string) => over('sum', labels, rate(choose(`${name}_${suffix}`)));
  return `${part('sum')} / ${part('count')}`;
}
