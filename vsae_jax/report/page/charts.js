// Small charts in SVG: histograms and lines, of one or two autoencoders.

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 420, HIGH = 170, LEFT = 44, FOOT = 30, TOP = 8;

function svg(kind, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function figure(title, note, ...drawn) {
  return el("figure.card", {}, el("figcaption", {}, title), ...drawn,
    note ? el("p.note", {}, note) : null);
}

function frame(title) {
  const box = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img" });
  box.append(svg("title", {}, title));
  return box;
}

// About `count` round numbers from low to high.
function ticks(low, high, count = 4) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  const size = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= count);
  const found = [];
  for (let t = Math.ceil(low / size); t * size <= high * (1 + 1e-9); t++) {
    found.push(Number((t * size).toPrecision(12)));
  }
  return found;
}

function axes(box, { x, y, xTicks, yTicks, xText = number, yText = number, label = "" }) {
  for (const t of yTicks) {
    box.append(svg("line", { class: "grid", x1: LEFT, x2: WIDE - 6, y1: y(t), y2: y(t) }));
    box.append(svg("text", { class: "tick", x: LEFT - 6, y: y(t) + 4, "text-anchor": "end" }, yText(t)));
  }
  for (const t of xTicks) {
    box.append(svg("text", { class: "tick", x: x(t), y: HIGH - FOOT + 14, "text-anchor": "middle" }, xText(t)));
  }
  box.append(svg("text", { class: "tick", x: WIDE - 6, y: HIGH - 2, "text-anchor": "end" }, label));
}

// bins: [{low, high, counts: [one per series]}]; log: counts on a logarithmic axis.
function histogram(title, bins, { classes = ["a"], xText = number, log = false, label = "", xTicks, note } = {}) {
  const box = frame(title);
  const low = bins[0].low, high = bins.at(-1).high;
  const most = Math.max(1, ...bins.flatMap((bin) => bin.counts));
  const squeeze = (count) => (log ? Math.log10(count + 1) / Math.log10(most + 1) : count / most);
  const x = (v) => LEFT + ((v - low) / (high - low || 1)) * (WIDE - LEFT - 6);
  const y = (count) => HIGH - FOOT - squeeze(count) * (HIGH - FOOT - TOP);
  const powers = [0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6].filter((t) => t <= most);
  axes(box, { x, y, xTicks: xTicks ?? ticks(low, high), xText, label,
    yTicks: log ? powers : ticks(0, most, 3).filter(Number.isInteger) });
  for (const bin of bins) {
    bin.counts.forEach((count, series) => {
      if (!count) return;
      const width = (x(bin.high) - x(bin.low) - 1) / bin.counts.length;
      const bar = svg("rect", { class: `bar ${classes[series]}`, x: x(bin.low) + 0.5 + series * width,
        y: y(count), width: Math.max(width, 0.7), height: HIGH - FOOT - y(count) });
      bar.tip = `${xText(bin.low)} to ${xText(bin.high)}\n${count.toLocaleString("en-US")}`;
      box.append(bar);
    });
  }
  return figure(title, note, box);
}

// lines: [{x: [...], y: [...], class}]. The frame holds all but the first tenth, where a
// run starts far from where it ends.
function curves(title, lines) {
  const box = frame(title);
  const later = (l) => l.y.slice(Math.floor(l.y.length / 10)).filter(Number.isFinite);
  const xs = lines.flatMap((l) => l.x), ys = lines.flatMap(later);
  if (!ys.length) return null;
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) [y0, y1] = [Math.min(0, y0), y1 || 1];
  const x = (v) => LEFT + ((v - x0) / (x1 - x0 || 1)) * (WIDE - LEFT - 6);
  const y = (v) => HIGH - FOOT - ((v - y0) / (y1 - y0)) * (HIGH - FOOT - TOP);
  axes(box, { x, y, xTicks: ticks(x0, x1), yTicks: ticks(y0, y1), label: "step" });
  for (const line of lines) {
    const seen = (v) => Number.isFinite(v) && v >= y0 && v <= y1;
    const points = line.x.map((v, i) => (seen(line.y[i]) ? `${x(v)},${y(line.y[i])}` : ""));
    box.append(svg("polyline", { class: `line ${line.class}`, points: points.join(" ") }));
    const last = line.y.length - 1;
    const end = svg("circle", { class: `bar ${line.class}`, cx: x(line.x[last]), cy: y(line.y[last]), r: 3 });
    end.tip = `step ${number(line.x[last], 6)}\n${number(line.y[last], 4)}`;
    box.append(end);
  }
  return figure(title, "", box);
}

// Bins of log10 of positive values, fine enough for about 25, that hold every value.
function logBins(series) {
  const logs = series.map((values) => values.filter((v) => v > 0).map(Math.log10));
  let low = Infinity, high = -Infinity;
  for (const v of logs.flat()) [low, high] = [Math.min(low, v), Math.max(high, v)];
  if (low > high) return [];
  const per = [4, 8, 16, 32, 64].find((fine) => (high - low) * fine >= 20) ?? 64;
  const first = Math.floor(low * per), last = Math.floor(high * per);
  const bins = [];
  for (let i = first; i <= last; i++) {
    bins.push({ low: i / per, high: (i + 1) / per, counts: series.map(() => 0) });
  }
  logs.forEach((values, s) => values.forEach((v) => bins[Math.floor(v * per) - first].counts[s]++));
  return bins;
}

// Round numbers for such bins: powers of ten, or 1, 2, 5 times them.
function logTicks(bins) {
  const found = [];
  const [low, high] = [bins[0].low, bins.at(-1).high];
  const factors = high - low > 2.5 ? [1] : [1, 2, 5];
  for (let p = Math.floor(low); p <= high; p++) {
    for (const f of factors) found.push(p + Math.log10(f));
  }
  return found.filter((t) => t >= low && t <= high);
}

const power = (log) => number(10 ** log, 2);
