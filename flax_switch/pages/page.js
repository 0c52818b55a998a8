// Draws what the page holds as JSON: curves one can hover, and maps of experts. Nothing is loaded from anywhere.
"use strict";
const NS = "http://www.w3.org/2000/svg";
const MAP = [[0, 34, 78], [49, 68, 107], [102, 105, 112], [149, 143, 120], [202, 186, 106], [254, 232, 56]]; // cividis
const element = (name, attributes = {}, parent = null, text = null) => {
  const made = name in { svg: 1, path: 1, line: 1, text: 1, circle: 1, g: 1 }
    ? document.createElementNS(NS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const shown = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(+value.toPrecision(4));
};
const ticks = (low, high, count) => {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) || 10), found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(12));
  return found;
};
const color = (share) => {
  const at = Math.max(0, Math.min(1, share)) * (MAP.length - 1), i = Math.min(Math.floor(at), MAP.length - 2);
  return `rgb(${MAP[i].map((c, k) => Math.round(c + (at - i) * (MAP[i + 1][k] - c))).join(" ")})`;
};
const tip = (plot) => element("div", { class: "tip", hidden: "" }, plot);
const place = (box, plot, x, y) => {
  box.hidden = false;
  const left = x + 14 + box.offsetWidth > plot.clientWidth ? x - 14 - box.offsetWidth : x + 14;
  box.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - box.offsetWidth))}px`;
  box.style.top = `${Math.max(0, y - box.offsetHeight - 8)}px`;
};
const row = (box, swatch, name, value) => {
  const line = element("div", {}, box);
  if (swatch) element("i", { style: `display:inline-block;width:.7em;height:.7em;border-radius:50%;background:${swatch};margin-right:.4em` }, line);
  line.append(`${name} `);
  element("b", {}, line, value);
};
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
};

function curves(figure, chart) {
  const legend = element("div", { class: "legend" }, figure), plot = element("div", { class: "plot" }, figure), hidden = new Set();
  const named = chart.series.map((series, i) => ({ ...series, ink: `var(--c${(series.color ?? i) % 8})` }));
  for (const series of named.length > 1 ? named : []) {
    const button = element("button", { type: "button", "aria-pressed": "true" }, legend);
    element("i", { style: `border-top-color:${series.ink};border-top-style:${series.dash ? "dashed" : "solid"}` }, button);
    button.append(series.name);
    button.onclick = () => {
      if (!hidden.delete(series.name)) hidden.add(series.name);
      button.setAttribute("aria-pressed", String(!hidden.has(series.name)));
      draw();
    };
  }
  function draw() {
    plot.replaceChildren();
    const W = plot.clientWidth, H = chart.height || 230, pad = { left: 54, right: 20, top: 8, bottom: 34 };
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", "aria-label": chart.title }, plot);
    const visible = named.filter((series) => !hidden.has(series.name) && series.x.length);
    if (!visible.length) return;
    const xs = visible.flatMap((s) => s.x), ys = visible.flatMap((s) => s.y).filter((y) => y !== null && (!chart.log || y > 0));
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [chart.zero ? 0 : Math.min(...ys), Math.max(...ys)];
    if (chart.top !== undefined) y1 = Math.min(y1, chart.top);
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    if (y0 === y1) { y1 += Math.abs(y1) * 0.1 || 1; if (!chart.zero) y0 -= Math.abs(y0) * 0.1 || 1; }
    const scale = chart.log ? Math.log10 : (v) => v, margin = (scale(y1) - scale(y0)) * 0.05;
    const [b0, b1] = [scale(y0) - (chart.zero ? 0 : margin), scale(y1) + margin];
    const X = (x) => pad.left + (x - x0) / (x1 - x0) * (W - pad.left - pad.right);
    const Y = (y) => H - pad.bottom - (scale(y) - b0) / (b1 - b0) * (H - pad.bottom - pad.top);
    let levels = chart.log ? ticks(Math.ceil(b0), Math.floor(b1), 5).filter(Number.isInteger).map((p) => 10 ** p) : ticks(b0, b1, 5);
    if (chart.log && levels.length < 2) levels = ticks(y0, y1, 4).filter((y) => y > 0);
    for (const y of levels) {
      element("line", { x1: pad.left, x2: W - pad.right, y1: Y(y), y2: Y(y), stroke: "var(--grid)" }, svg);
      element("text", { x: pad.left - 7, y: Y(y) + 4, "text-anchor": "end" }, svg, shown(y));
    }
    for (const x of ticks(x0, x1, Math.max(2, Math.floor(W / 90))))
      element("text", { x: X(x), y: H - pad.bottom + 16, "text-anchor": "middle" }, svg, shown(x));
    element("text", { x: W - pad.right, y: H - 3, "text-anchor": "end" }, svg, chart.x || "step");
    for (const series of visible) {
      let path = "", pen = "M";
      series.x.forEach((x, i) => {
        const y = series.y[i];
        if (y === null || (chart.log && y <= 0)) { pen = "M"; return; }
        path += `${pen}${X(x).toFixed(1)} ${Math.max(pad.top, Y(y)).toFixed(1)}`;
        pen = "L";
      });
      element("path", { d: path, fill: "none", stroke: series.ink, "stroke-width": series.points ? 2 : 1.6, "stroke-linejoin": "round",
        "stroke-dasharray": series.dash ? "5 4" : "none" }, svg);
      if (series.points || series.x.length === 1)
        series.x.forEach((x, i) => series.y[i] !== null && Y(series.y[i]) >= pad.top && element("circle", { cx: X(x), cy: Y(series.y[i]), r: 3, fill: series.ink }, svg));
    }
    const cross = element("line", { y1: pad.top, y2: H - pad.bottom, stroke: "var(--soft)", "stroke-dasharray": "3 3", visibility: "hidden" }, svg);
    const dots = visible.map((series) => element("circle", { r: 4, fill: series.ink, stroke: "var(--card)", "stroke-width": 1.5, visibility: "hidden" }, svg));
    const box = tip(plot);
    plot.onpointermove = (event) => {
      const at = plot.getBoundingClientRect(), wanted = x0 + (event.clientX - at.left - pad.left) / (W - pad.left - pad.right) * (x1 - x0);
      const step = visible.map((series) => series.x[nearest(series.x, wanted)])
        .reduce((best, x) => Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best);
      box.replaceChildren();
      element("div", { class: "soft" }, box, `${chart.x || "step"} ${shown(step)}`);
      visible.forEach((series, i) => {
        const k = nearest(series.x, step), y = series.y[k], here = series.x[k] === step || series.dash;
        if (!here || y === null) { dots[i].setAttribute("visibility", "hidden"); return; }
        row(box, series.ink, series.name, shown(y));
        for (const [key, value] of Object.entries({ cx: X(series.dash ? step : series.x[k]), cy: Math.max(pad.top, Y(y)), visibility: "visible" })) dots[i].setAttribute(key, value);
      });
      for (const [key, value] of Object.entries({ x1: X(step), x2: X(step), visibility: "visible" })) cross.setAttribute(key, value);
      place(box, plot, X(step), event.clientY - at.top);
    };
    plot.onpointerleave = () => { box.hidden = true; [cross, ...dots].forEach((mark) => mark.setAttribute("visibility", "hidden")); };
  }
  new ResizeObserver(draw).observe(plot);
  draw();
}

function heat(figure, chart) {
  const plot = element("div", { class: "plot" }, figure), canvas = element("canvas", { role: "img", "aria-label": chart.title }, plot);
  const box = tip(plot), rows = chart.values.length, columns = chart.values[0].length;
  const axis = chart.axis || "step", brief = chart.rows.map((name) => name.length > 18 ? `${name.slice(0, 17)}…` : name);
  const left = 8 + 7 * Math.max(...brief.map((name) => name.length)), bottom = 20, height = Math.max(72, Math.min(260, rows * (chart.tall || 14)));
  function draw() {
    const W = plot.clientWidth, ratio = window.devicePixelRatio || 1, paint = canvas.getContext("2d"), soft = getComputedStyle(canvas).getPropertyValue("--soft");
    canvas.width = W * ratio; canvas.height = (height + bottom) * ratio; canvas.style.height = `${height + bottom}px`;
    paint.scale(ratio, ratio);
    const w = (W - left) / columns, h = height / rows;
    chart.values.forEach((line, r) => line.forEach((value, c) => {
      paint.fillStyle = color(value / chart.high);
      paint.fillRect(left + c * w, r * h, w + 0.6, h + (h > 6 ? -1 : 0.6));
    }));
    paint.fillStyle = soft; paint.font = "11px system-ui, sans-serif"; paint.textAlign = "right"; paint.textBaseline = "middle";
    const every = Math.ceil(14 / h);
    brief.forEach((name, r) => r % every === 0 && paint.fillText(name, left - 5, (r + 0.5) * h));
    paint.textBaseline = "alphabetic"; paint.textAlign = "left"; paint.fillText(`${axis} ${shown(chart.x[0])}`, left, height + 15);
    paint.textAlign = "right"; paint.fillText(shown(chart.x[columns - 1]), W - 1, height + 15);
  }
  plot.onpointermove = (event) => {
    const at = plot.getBoundingClientRect(), c = Math.floor((event.clientX - at.left - left) / (at.width - left) * columns);
    const r = Math.floor((event.clientY - at.top) / height * rows);
    if (c < 0 || c >= columns || r < 0 || r >= rows) { box.hidden = true; return; }
    box.replaceChildren();
    element("div", { class: "soft" }, box, `${axis} ${shown(chart.x[c])}`);
    row(box, color(chart.values[r][c] / chart.high), `${chart.row} ${chart.rows[r]}:`, `${shown(chart.values[r][c])} ${chart.unit}`);
    place(box, plot, event.clientX - at.left, event.clientY - at.top);
  };
  plot.onpointerleave = () => { box.hidden = true; };
  new ResizeObserver(draw).observe(plot);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

for (const bar of document.querySelectorAll(".scale i"))
  bar.style.background = `linear-gradient(90deg, ${MAP.map((c) => `rgb(${c.join(" ")})`).join(", ")})`;
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
  (chart.values ? heat : curves)(figure, chart);
}
for (const kind of ["pointerover", "pointerout"])
  document.addEventListener(kind, (event) => {
    const chip = event.target.closest?.("[data-expert]"), expert = kind === "pointerover" && chip ? chip.dataset.expert : null;
    for (const other of document.querySelectorAll("[data-expert]"))
      other.style.opacity = expert === null || other.dataset.expert === expert ? "" : "0.2";
  });
