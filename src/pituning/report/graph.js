// Choosing an expert in the chart or by name shows its card and its nearest; zooming in shows the labels of what is in view.
(() => {
  const data = JSON.parse(document.getElementById("graph-data").textContent);
  const chart = document.getElementById("chart-network");
  const panel = document.getElementById("card"), field = document.getElementById("find");
  const last = chart.data.length, LABELS = last - 3, LINES = last - 2, RING = last - 1;
  const make = (tag, text, parent) => {
    const element = document.createElement(tag);
    element.textContent = text;
    parent.appendChild(element);
    return element;
  };
  const choose = (index) => {
    const node = data.nodes[index], x = [], y = [];
    for (const [other] of node.neighbours) {
      x.push(node.x, data.nodes[other].x, null);
      y.push(node.y, data.nodes[other].y, null);
    }
    Plotly.restyle(chart, { x: [x, [node.x]], y: [y, [node.y]] }, [LINES, RING]);
    panel.replaceChildren();
    make("h3", node.name, panel);
    const facts = make("dl", "", panel);
    facts.className = "facts";
    for (const [key, value] of node.card) {
      const row = make("div", "", facts);
      make("dt", key, row);
      make("dd", value, row);
    }
    const nearest = make("p", "most similar: ", panel);
    for (const [other, similarity] of node.neighbours) {
      const button = make("button", `${data.nodes[other].name} ${similarity.toFixed(3)}`, nearest);
      button.onclick = () => choose(other);
    }
    field.value = node.name;
  };
  chart.on("plotly_click", (event) => {
    const index = event.points[0].customdata;
    if (typeof index === "number") choose(index);
  });
  field.onchange = () => {
    const index = data.nodes.findIndex((node) => node.name === field.value);
    if (index >= 0) choose(index);
  };
  const inside = (value, [low, high]) => value >= low && value <= high;
  let shown = "fitting";
  chart.on("plotly_relayout", () => {
    const { xaxis, yaxis } = chart.layout;
    const view = data.nodes.filter((node) => inside(node.x, xaxis.range) && inside(node.y, yaxis.range));
    const wanted = view.length <= data.labelled ? "all" : "fitting";
    if (wanted === shown) return;
    shown = wanted;
    const text = data.nodes.map((node) => (wanted === "all" || node.fitting ? node.label : ""));
    Plotly.restyle(chart, { text: [text] }, [LABELS]);
  });
})();
