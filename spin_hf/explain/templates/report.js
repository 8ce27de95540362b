"use strict";
(() => {
  const PALETTES = {
    light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
    dark: ["#56B4E9", "#E69F00", "#2BC79A", "#CC79A7", "#F0E442", "#8AA9FF"],
  };
  // Ends at a middle tone, on which the numbers can be read.
  const SCALES = { light: [[0, "#FFFFFF"], [1, "#6FAFD6"]], dark: [[0, "#14161A"], [1, "#2A6A94"]] };
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  function coloured(chart) {
    const style = getComputedStyle(document.documentElement);
    const [ink, muted, line, paper] = ["--ink", "--muted", "--line", "--paper"].map((v) => style.getPropertyValue(v).trim());
    const mode = dark.matches ? "dark" : "light";
    const named = { ink, muted };
    const narrow = window.innerWidth < 640;
    const { data, layout } = structuredClone(chart);
    for (const trace of data) {
      const { colour } = trace.meta;
      if (colour === "scale") {
        Object.assign(trace, { colorscale: SCALES[mode], textfont: { color: ink } });
        continue;
      }
      const value = named[colour] || PALETTES[mode][colour % 6];
      trace.marker = { ...trace.marker, color: value };
      if (trace.line) trace.line.color = value;
      for (const key of ["error_x", "error_y"]) if (trace[key]) trace[key].color = value;
    }
    for (const shape of layout.shapes || []) {
      if (shape.type === "rect") Object.assign(shape, { fillcolor: muted, opacity: 0.15 });
      else shape.line.color = muted;
    }
    for (const name of ["xaxis", "yaxis"]) {
      Object.assign(layout[name], { gridcolor: line, linecolor: muted, zerolinecolor: line, tickcolor: muted });
    }
    Object.assign(layout, {
      paper_bgcolor: paper, plot_bgcolor: paper, font: { color: ink, size: narrow ? 12 : 13 },
      margin: { l: 48, r: 12, t: 16, b: 44 }, hovermode: "closest", autosize: true,
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" },
      hoverlabel: { bgcolor: paper, bordercolor: muted, font: { color: ink }, align: "left", namelength: -1 },
      dragmode: coarse ? false : "zoom",
      ...(still ? { transition: { duration: 0 } } : {}),
    });
    return { data, layout };
  }

  function openCell(event) {
    const [row, column] = event.points[0].pointIndex || event.points[0].pointNumber;
    const cell = document.getElementById(`cell-${row}-${column}`);
    if (!cell) return;
    for (let at = cell; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    cell.scrollIntoView({ block: "center" });
    cell.querySelector("summary").focus({ preventScroll: true });
  }

  // Room for the legend, which stands below the axes: one name a line where the page is narrow.
  function heightOf({ data, layout }) {
    const bars = data.some((trace) => trace.orientation === "h") ? data[0].y.length : 0;
    const rows = data.some((trace) => trace.type === "heatmap") ? data[0].z.length : 0;
    const names = layout.showlegend ? data.length : 0;
    const lines = window.innerWidth < 640 ? names : Math.ceil(names / 4);
    const plot = bars ? 90 + 26 * bars : rows ? Math.min(640, 150 + 34 * rows) : 340;
    return Math.max(plot, 230) + 21 * lines;
  }

  function draw(place) {
    const { data, layout } = coloured(charts[place.dataset.chart]);
    place.style.height = `${heightOf({ data, layout })}px`;
    const config = {
      responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d"],
      toImageButtonOptions: { format: "svg", filename: place.dataset.chart },
    };
    return window.Plotly.react(place, data, layout, config).then(() => {
      if (place.dataset.chart === "confusion" && !place.dataset.linked) {
        place.dataset.linked = "yes";
        place.on("plotly_click", openCell);
      }
    });
  }

  async function start() {
    const places = [...document.querySelectorAll(".chart")];
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.text = await new Response(stream).text();
    document.head.append(script);
    const drawOnce = (place) => {
      if (place.dataset.drawn) return;
      place.dataset.drawn = "yes";
      draw(place);
    };
    const watch = new IntersectionObserver((seen) => {
      for (const { isIntersecting, target } of seen) if (isIntersecting) drawOnce(target);
    }, { rootMargin: "400px" });
    addEventListener("beforeprint", () => places.forEach(drawOnce));  // paper shows those too that no one scrolled to
    for (const place of places) watch.observe(place);
    for (const place of places) place.style.height = `${heightOf(charts[place.dataset.chart])}px`;
    const again = () => places.filter((place) => place.dataset.drawn).forEach(draw);
    dark.addEventListener("change", again);
    document.documentElement.dataset.ready = "yes";
  }

  start().catch((error) => {
    for (const place of document.querySelectorAll(".chart")) {
      place.textContent = `The chart can't be drawn here (${error}). Its numbers are in the table below it.`;
    }
  });
})();
