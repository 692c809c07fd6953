// Draws the charts, and draws them again when the colours or the paper change.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displayModeBar: false, displaylogo: false };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Only keys that hold a colour are looked up: a site may be called "--ink".
  function coloured(node, style) {
    if (Array.isArray(node)) return node.map((child) => coloured(child, style));
    if (node === null || typeof node !== "object") return node;
    return Object.fromEntries(
      Object.entries(node).map(([key, value]) =>
        key.endsWith("color") && typeof value === "string" && value.startsWith("--")
          ? [key, style.getPropertyValue(value).trim()]
          : [key, coloured(value, style)]
      )
    );
  }

  function draw(width) {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = coloured(figure, style);
      if (width) Object.assign(layout, { width, autosize: false });
      // Not react(): that keeps the margins of the old width, and the legend lands on the bars.
      Plotly.newPlot(id, data, layout, config);
    }
  }

  const PAPER = 640; // px: A4 and Letter within their margins
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not([data-long])")];
    closed.forEach((details) => (details.open = true));
    document.documentElement.dataset.paper = "";
    draw(PAPER);
  });
  window.addEventListener("afterprint", () => {
    closed.forEach((details) => (details.open = false));
    delete document.documentElement.dataset.paper;
    draw();
  });
  dark.addEventListener("change", () => draw());
  draw();
})();
