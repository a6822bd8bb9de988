// Panels and their places, typed by Grafana's own schema.

import {
  AxisPlacement,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  type DataQuery,
  DashboardCursorSync,
  type Dashboard,
  type DataSourceRef,
  FieldColorModeId,
  GraphDrawStyle,
  GraphThresholdsStyleMode,
  LegendDisplayMode,
  type Panel,
  PercentChangeColorMode,
  type RowPanel,
  SortOrder,
  StackingMode,
  type Threshold,
  ThresholdsMode,
  TooltipDisplayMode,
  VariableHide,
  type VariableModel,
  VariableRefresh,
  VariableSort,
  VizOrientation,
} from '@grafana/schema';
import type { Options as StatOptions } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type {
  FieldConfig as SeriesConfig,
  Options as SeriesOptions,
} from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

const COLUMNS = 24;
const DATASOURCE: DataSourceRef = { type: 'prometheus', uid: '${datasource}' };

/** Units of Grafana that the panels use. */
export type Unit = 'Bps' | 'bytes' | 'cps' | 'd' | 'none' | 'ops' | 'percentunit' | 'pps' | 's' | 'short' | 'suffix:×';

/** A query, and what its lines are called. */
export interface Line {
  expr: string;
  legend: string;
}

/** What the schema leaves open: Prometheus' part of a query. */
interface PrometheusQuery extends DataQuery {
  expr: string;
  legendFormat: string;
  range: boolean;
  instant: boolean;
  editorMode: 'code';
}

/** What every panel needs. */
export interface Content {
  title: string;
  /** What is shown, and what to do when it looks wrong. */
  description: string;
  unit: Unit;
  lines: Line[];
  /** Columns, of 24. */
  width?: number;
  decimals?: number;
  min?: number;
  max?: number;
  /** From here on things are bad. */
  limits?: { warning?: number; bad?: number; below?: boolean };
}

/** A panel without its place. */
export interface Unplaced {
  width: number;
  height: number;
  panel: Panel;
}

/** A heading with the panels below it. */
export interface Section {
  title: string;
  panels: Unplaced[];
}

function queries(lines: Line[], instant: boolean): Panel['targets'] {
  return lines.map(({ expr, legend }, at): PrometheusQuery & Record<string, unknown> => ({
    refId: String.fromCharCode('A'.charCodeAt(0) + at),
    datasource: DATASOURCE,
    expr,
    legendFormat: legend,
    range: !instant,
    instant,
    editorMode: 'code',
  }));
}

function steps({ warning, bad, below }: NonNullable<Content['limits']>): Threshold[] {
  // The first step has no lower end: Grafana writes that as null.
  const all: [number | null | undefined, string][] = below
    ? [[null, 'red'], [bad, 'orange'], [warning, 'green']]
    : [[null, 'green'], [warning, 'orange'], [bad, 'red']];
  return all.flatMap(([value, color]) => (value === undefined ? [] : [{ color, value }]));
}

function defaults({ unit, decimals, min, max, limits }: Content) {
  return {
    unit,
    ...(decimals === undefined ? {} : { decimals }),
    ...(min === undefined ? {} : { min }),
    ...(max === undefined ? {} : { max }),
    thresholds: { mode: ThresholdsMode.Absolute, steps: steps(limits ?? {}) },
  };
}

/** Lines over time; stacked if their sum means something. */
export function series(content: Content & { stacked?: boolean; log?: boolean }): Unplaced {
  const custom: SeriesConfig = {
    drawStyle: GraphDrawStyle.Line,
    lineWidth: 1,
    fillOpacity: content.stacked ? 30 : 0,
    axisPlacement: AxisPlacement.Auto,
    stacking: { mode: content.stacked ? StackingMode.Normal : StackingMode.None, group: 'A' },
    thresholdsStyle: { mode: content.limits ? GraphThresholdsStyleMode.Dashed : GraphThresholdsStyleMode.Off },
  };
  const options: SeriesOptions = {
    legend: { displayMode: LegendDisplayMode.List, placement: 'bottom', showLegend: true, calcs: [] },
    tooltip: { mode: TooltipDisplayMode.Multi, sort: SortOrder.Descending },
  };
  return {
    width: content.width ?? 12,
    height: 8,
    panel: {
      type: 'timeseries',
      title: content.title,
      description: content.description,
      datasource: DATASOURCE,
      fieldConfig: { defaults: { ...defaults(content), color: { mode: FieldColorModeId.PaletteClassic }, custom: { ...custom } }, overrides: [] },
      options: { ...options },
      targets: queries(content.lines, false) ?? [],
    },
  };
}

/** One figure per line. */
export function stat(content: Content): Unplaced {
  const options: StatOptions = {
    colorMode: content.limits ? BigValueColorMode.Value : BigValueColorMode.None,
    graphMode: BigValueGraphMode.None,
    justifyMode: BigValueJustifyMode.Auto,
    orientation: VizOrientation.Auto,
    percentChangeColorMode: PercentChangeColorMode.Standard,
    reduceOptions: { calcs: ['lastNotNull'], fields: '', values: false },
    showPercentChange: false,
    textMode: content.lines.length > 1 ? BigValueTextMode.ValueAndName : BigValueTextMode.Auto,
    wideLayout: true,
  };
  return {
    width: content.width ?? 4,
    height: 4,
    panel: {
      type: 'stat',
      title: content.title,
      description: content.description,
      datasource: DATASOURCE,
      fieldConfig: { defaults: { ...defaults(content), color: { mode: FieldColorModeId.Thresholds } }, overrides: [] },
      options: { ...options },
      targets: queries(content.lines, true) ?? [],
    },
  };
}

/** Panels side by side in the order given, each section from a line of its own. */
function placed(sections: Section[]): (Panel | RowPanel)[] {
  const panels: (Panel | RowPanel)[] = [];
  let top = 0;
  for (const section of sections) {
    const gridPos = { x: 0, y: top, w: COLUMNS, h: 1 };
    panels.push({ type: 'row', id: panels.length + 1, title: section.title, collapsed: false, gridPos, panels: [] });
    top += 1;
    let [left, tallest] = [0, 0];
    for (const { width, height, panel } of section.panels) {
      if (left + width > COLUMNS) {
        top += tallest;
        [left, tallest] = [0, 0];
      }
      panels.push({ id: panels.length + 1, ...panel, gridPos: { x: left, y: top, w: width, h: height } });
      left += width;
      tallest = Math.max(tallest, height);
    }
    top += tallest;
  }
  return panels;
}

/** Values of a label of `arc_build_info`, all of them unless some are chosen. */
function label(name: string, description: string, matchers: string): VariableModel {
  const query = `label_values(arc_build_info{${matchers}}, ${name})`;
  return {
    type: 'query',
    name,
    label: name,
    description,
    datasource: DATASOURCE,
    query: { qryType: 1, query, refId: `variable-${name}` },
    refresh: VariableRefresh.onTimeRangeChanged,
    sort: VariableSort.naturalAsc,
    hide: VariableHide.dontHide,
    multi: true,
    includeAll: true,
    // Also those that do not have the label: outside Kubernetes there is no namespace.
    allValue: '.*',
    current: { selected: true, text: ['All'], value: ['$__all'] },
    options: [],
  };
}

function variables(): VariableModel[] {
  const datasource: VariableModel = {
    type: 'datasource',
    name: 'datasource',
    label: 'data source',
    description: 'The Prometheus that scrapes shards and workers',
    query: 'prometheus',
    refresh: VariableRefresh.onDashboardLoad,
    hide: VariableHide.dontHide,
    multi: false,
    includeAll: false,
    current: { selected: false, text: 'default', value: 'default' },
    options: [],
  };
  return [
    datasource,
    label('namespace', 'Kubernetes namespace', ''),
    label('job', 'Training job: shards and workers of one job have the same', 'namespace=~"$namespace"'),
    label('pool', 'Pool of workers', 'component="worker",namespace=~"$namespace",job=~"$job"'),
  ];
}

/** A whole dashboard. */
export function dashboard(uid: string, title: string, description: string, sections: Section[]): Dashboard {
  return {
    uid,
    title,
    description,
    tags: ['arc-topk'],
    editable: true,
    graphTooltip: DashboardCursorSync.Crosshair,
    id: null,
    links: [
      {
        type: 'dashboards',
        title: 'arc-topk',
        tags: ['arc-topk'],
        asDropdown: false,
        icon: 'external link',
        includeVars: true,
        keepTime: true,
        targetBlank: false,
        tooltip: 'The other dashboards of the same jobs',
      },
    ],
    annotations: { list: [] },
    panels: placed(sections),
    refresh: '10s',
    schemaVersion: 42,
    templating: { list: variables() },
    time: { from: 'now-1h', to: 'now' },
    timepicker: {},
    timezone: 'browser',
    version: 1,
    weekStart: '',
  };
}
