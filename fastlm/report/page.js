"use strict";
// Draws the charts from the JSON in #data. One colour a run, in all charts; x is what the reader chooses.

const COLOURS = ["#3b8ed0", "#d9622b", "#2a9d6f", "#c06bb0", "#b58900", "#7a6fd0", "#8a8f98"];
const AXES = { tokens: "tokens trained", hours: "hours of training steps", step: "steps" };
let data = JSON.parse(document.getElementById("data").textContent);

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const axis = () => document.querySelector("input[name=axis]:checked").value;

function trace(curve, chart) {
  const colour = COLOURS[data.runs.indexOf(curve.run) % COLOURS.length];
  const alone = curve.y.length === 1;
  const few = alone || curve.marks || Boolean(chart.x);
  return {
    name: curve.name,
    x: chart.x ? curve.x : curve[axis()],
    y: curve.y,
    text: curve.text,
    mode: curve.marks || alone ? "markers" : few ? "lines+markers" : "lines",
    marker: { color: colour, size: 8, symbol: curve.marks ? "diamond" : "circle" },
    line: { color: colour, width: 2 },
    hovertemplate: "%{y:.4g}" + (curve.text ? " (%{text})" : "") + "<extra>%{fullData.name}</extra>",
  };
}

function layout(chart) {
  const rule = style("--rule");
  const shared = { gridcolor: rule, linecolor: rule, zerolinecolor: rule, automargin: true };
  return {
    margin: { l: 56, r: 12, t: 12, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--ink"), family: "system-ui, sans-serif", size: 12 },
    hovermode: "closest",
    hoverlabel: { bgcolor: style("--panel"), font: { color: style("--ink") } },
    showlegend: chart.curves.length > 1,
    legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0 },
    xaxis: {
      ...shared,
      title: { text: chart.x || AXES[axis()], standoff: 8 },
      type: chart.log_x ? "log" : "linear",
      dtick: chart.log_x ? 1 : undefined,
      rangemode: "tozero",
      nticks: 6,
    },
    yaxis: {
      ...shared,
      title: { text: chart.y, standoff: 8 },
      nticks: 7,
      exponentformat: "power",
      rangemode: chart.from_zero ? "tozero" : "normal",
    },
  };
}

function draw() {
  data.charts.forEach((chart, i) => {
    const place = document.getElementById("chart-" + i);
    const traces = chart.curves.map((curve) => trace(curve, chart));
    Plotly.react(place, traces, layout(chart), { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

// Of a page that follows runs: what has changed since is fetched and put in place.
async function refresh() {
  const footer = document.getElementById("footer");
  try {
    const answer = await fetch("/");
    if (!answer.ok) throw new Error(answer.statusText);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    const found = JSON.parse(next.getElementById("data").textContent);
    if (found.charts.length !== data.charts.length) return location.reload();
    data = found;
    document.getElementById("runs").replaceWith(next.getElementById("runs"));
    draw();
    footer.textContent = "As of " + new Date().toLocaleTimeString() + ".";
  } catch (error) {
    footer.textContent = "No longer updated: " + error.message + ".";
  }
}

document.querySelectorAll("input[name=axis]").forEach((input) => input.addEventListener("change", draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
if (data.live) setInterval(refresh, 5000);
