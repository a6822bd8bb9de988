// A dashboard with its data, drawn by Grafana's own components, to be photographed. `take.py` makes the data.

import {
  createTheme,
  type DataFrame,
  dateTime,
  type Field,
  type FieldConfig,
  FieldType,
  getDisplayProcessor,
  ThemeContext,
  type TimeRange,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import 'uplot/dist/uPlot.min.css';

/** What a query answered, a line for each. */
interface Line {
  name: string;
  /** Milliseconds. */
  times: number[];
  values: Array<number | null>;
}

interface Panel {
  id: number;
  type: 'row' | 'stat' | 'timeseries';
  title: string;
  gridPos: { x: number; y: number; w: number; h: number };
  fieldConfig: { defaults: FieldConfig };
  options: Record<string, any>;
  lines: Line[];
}

interface Shown {
  from: number;
  to: number;
  panels: Panel[];
}

declare global {
  interface Window {
    shown: Shown;
  }
}

const COLUMNS = 24;
const GAP = 8;
const UNIT = 38;
const WIDTH = 1600;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeZone = 'utc';

function valueField(panel: Panel, line: Line, seriesIndex: number): Field {
  const { thresholds, ...rest } = panel.fieldConfig.defaults;
  const steps = thresholds?.steps.map((step) => ({ ...step, value: step.value ?? -Infinity }));
  const field: Field = {
    name: line.name,
    type: FieldType.number,
    values: line.values,
    config: { ...rest, displayName: line.name, ...(thresholds && steps && { thresholds: { ...thresholds, steps } }) },
    state: { seriesIndex, displayName: line.name },
  };
  return { ...field, display: getDisplayProcessor({ field, theme, timeZone }) };
}

function frames(panel: Panel): DataFrame[] {
  return panel.lines.map((line, at) => {
    const time: Field = { name: 'Time', type: FieldType.time, values: line.times, config: {} };
    time.display = getDisplayProcessor({ field: time, theme, timeZone });
    return { refId: String(at), length: line.times.length, fields: [time, valueField(panel, line, at)] };
  });
}

function Stat({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const each = width / Math.max(1, panel.lines.length);
  return (
    <div style={{ display: 'flex' }}>
      {panel.lines.map((line, at) => {
        const field = valueField(panel, line, at);
        const value = field.display!(line.values.at(-1));
        const { colorMode, graphMode, textMode, justifyMode } = panel.options;
        return (
          <BigValue
            key={at}
            value={{ ...value, title: line.name }}
            count={panel.lines.length}
            width={each}
            height={height}
            theme={theme}
            colorMode={colorMode}
            graphMode={graphMode}
            textMode={textMode}
            justifyMode={justifyMode}
          />
        );
      })}
    </div>
  );
}

function Content({ panel, range, width, height }: { panel: Panel; range: TimeRange; width: number; height: number }) {
  if (panel.lines.length === 0) {
    return <p style={{ textAlign: 'center' }}>No data</p>;
  }
  if (panel.type === 'stat') {
    return <Stat panel={panel} width={width} height={height} />;
  }
  return (
    <TimeSeries
      frames={frames(panel)}
      structureRev={1}
      timeRange={range}
      timeZone={timeZone}
      width={width}
      height={height}
      legend={panel.options.legend}
    />
  );
}

function Placed({ panel, range }: { panel: Panel; range: TimeRange }) {
  const { x, y, w, h } = panel.gridPos;
  const column = (WIDTH - GAP) / COLUMNS;
  const [width, height] = [w * column - GAP, h * UNIT - GAP];
  const style = { position: 'absolute' as const, left: GAP + x * column, top: GAP + y * UNIT, width, height };
  if (panel.type === 'row') {
    return <h4 style={{ ...style, margin: 0, color: theme.colors.text.primary }}>{panel.title}</h4>;
  }
  return (
    <div style={style}>
      <PanelChrome title={panel.title} width={width} height={height}>
        {(innerWidth, innerHeight) => <Content panel={panel} range={range} width={innerWidth} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}

function Dashboard({ panels, from, to }: Shown) {
  const [start, end] = [dateTime(from), dateTime(to)];
  const range = { from: start, to: end, raw: { from: start, to: end } };
  const height = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h)) * UNIT + GAP;
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: WIDTH, height, background: theme.colors.background.canvas }}>
        {panels.map((panel) => (
          <Placed key={panel.id} panel={panel} range={range} />
        ))}
      </div>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('root')!).render(<Dashboard {...window.shown} />);
