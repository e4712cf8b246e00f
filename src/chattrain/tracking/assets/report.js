// Draws the charts of a report with uPlot. Each `figure.chart` holds its chart as JSON; tracking/charts.py has the fields.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => (dark.matches ? "#b3bcc5" : "#4b535c");
  const faint = () => (dark.matches ? "#8b949e38" : "#8b949e50");
  const plots = [];

  const number = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size && size < 1e-3) return value.toExponential(1);
    return String(+value.toPrecision(4));
  };
  const percent = (value) => (value == null ? "" : (100 * value).toFixed(1) + "%");

  // The index nearest to `from` that has a value: runs log at different steps.
  const nearest = (values, from, style) => {
    if (style === "dashes") return from;  // a fit has no value beyond its ends
    for (let away = 0; away < values.length; away++)
      for (const i of [from - away, from + away]) if (values[i] != null) return i;
    return from;
  };

  const last = (u, chart) =>
    u.setLegend({ idxs: u.data.map((values, i) => nearest(values, values.length - 1, i && chart.series[i - 1].style)) });

  const series = (one, show) => {
    const dots = one.style === "dots";
    const lone = one.values.filter((v) => v != null).length <= 40;
    return {
      label: one.label,
      stroke: one.color + (one.faint ? "a0" : ""),
      width: 1.75,
      dash: one.style === "dashes" ? [6, 4] : undefined,
      spanGaps: true,
      paths: dots ? () => null : undefined,
      points: { show: one.style !== "dashes" && (dots || lone), size: dots ? 7 : 5, fill: one.color + (one.faint ? "80" : "") },
      value: (u, v) => (v == null ? "–" : show(v)),
    };
  };

  const bars = (u, chart) => {  // half of a 95 % interval above and below each value
    const { ctx } = u;
    ctx.save();
    chart.series.forEach((one, i) => {
      if (!one.half || !u.series[i + 1].show) return;
      ctx.strokeStyle = one.color + "90";
      ctx.lineWidth = 1.5 * devicePixelRatio;
      one.half.forEach((half, j) => {
        if (half == null || one.values[j] == null) return;
        const x = u.valToPos(chart.x[j], "x", true);
        ctx.beginPath();
        ctx.moveTo(x, u.valToPos(one.values[j] - half, "y", true));
        ctx.lineTo(x, u.valToPos(one.values[j] + half, "y", true));
        ctx.stroke();
      });
    });
    ctx.restore();
  };

  const bands = (u, chart) => {  // an interval on the x axis
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const band of chart.bands) {
      const [low, high, at] = [band.low, band.high, band.at].map((x) => (x == null ? null : u.valToPos(x, "x", true)));
      ctx.fillStyle = band.color + "28";
      if (low != null) ctx.fillRect(low, bbox.top, high - low, bbox.height);
      ctx.fillStyle = band.color + "b0";
      if (at != null) ctx.fillRect(at, bbox.top, devicePixelRatio, bbox.height);
    }
    ctx.restore();
  };

  const draw = (place) => {
    const chart = JSON.parse(place.querySelector("script").textContent);
    const box = place.querySelector(".plot");
    const show = chart.percent ? percent : number;
    const size = () => ({ width: box.clientWidth, height: chart.tall ? 320 : 220 });
    const axis = { stroke: ink, grid: { stroke: faint, width: 1 }, ticks: { stroke: faint, width: 1, size: 4 }, font: "11px system-ui, sans-serif" };
    const options = {
      ...size(),
      cursor: {
        sync: { key: chart.x_label, scales: ["x", null] },
        dataIdx: (u, i, index) => (i === 0 ? index : nearest(u.data[i], index, chart.series[i - 1].style)),
        drag: { x: true, y: false },
      },
      scales: {
        x: { time: false, distr: chart.x_log ? 3 : 1, ...(chart.x_range && { range: () => chart.x_range }) },
        y: { distr: chart.y_log ? 3 : 1, ...(chart.y_range && { range: () => chart.y_range }) },
      },
      axes: [
        { ...axis, size: 30, values: (u, all) => all.map(number) },
        { ...axis, size: (u, all) => 12 + 6.5 * Math.max(3, ...(all || []).map((v) => v.length)), values: (u, all) => all.map(show) },
      ],
      series: [{ label: chart.x_label, value: (u, v) => number(v) || "–" }, ...chart.series.map((one) => series(one, show))],
      hooks: { ready: [(u) => last(u, chart)], drawClear: [(u) => bands(u, chart)], draw: [(u) => bars(u, chart)] },
    };
    const plot = new uPlot(options, [chart.x, ...chart.series.map((one) => one.values)], box);
    plot.over.addEventListener("mouseleave", () => setTimeout(() => last(plot, chart)));
    new ResizeObserver(() => plot.setSize(size())).observe(box);
    plots.push(plot);
  };

  document.querySelectorAll("figure.chart").forEach(draw);
  dark.addEventListener("change", () => plots.forEach((plot) => plot.redraw(false, true)));
})();
