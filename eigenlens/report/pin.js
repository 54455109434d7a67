// Pin components: a press on a node of the circuit, or on a name in a table, opens a card that says
// what the component reads and writes; another press, its button or Escape closes it.
// What cards hold is the JSON of #components, by node; nothing is ever read as markup.
(() => {
  const source = document.getElementById("components");
  if (!source) return;  // the model was not there to be asked
  const known = new Map(Object.entries(JSON.parse(source.textContent)));
  const panel = document.getElementById("panel");
  const status = document.getElementById("panel-status");
  const circuit = document.getElementById("figure-circuit");
  const cards = new Map();  // by node, in the order in which they were pinned
  const openers = new Map();  // what was pressed, which takes the focus back

  const make = (tag, properties = {}, ...children) => {
    const { style, ...rest } = properties;
    const element = Object.assign(document.createElement(tag), rest);
    Object.assign(element.style, style);
    element.append(...children);
    return element;
  };
  const link = (node) => known.has(node)
    ? make("button", { type: "button", className: "pin", textContent: node }) : node;
  const part = (title, ...children) => make("section", {}, make("h4", { textContent: title }), ...children);

  function paths(title, found) {
    const rows = found.shown.map(([node, effect, position]) =>
      make("tr", {}, make("td", {}, link(node)), make("td", { textContent: effect, className: "number" }),
        make("td", { textContent: position, className: "number" })));
    const head = ["", "effect (nats)", "at"].map((text) =>
      make("th", { textContent: text, scope: "col", className: text && "number" }));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    const more = found.all > rows.length ? [make("p", { textContent: `the strongest of ${found.all}` })] : [];
    return part(title, ...(rows.length ? [table, ...more] : [make("p", { textContent: "none" })]));
  }

  function passage({ coordinate, tokens, shares, at }) {
    const spans = tokens.map((token, place) => make(place === at ? "mark" : "span", {
      textContent: token,
      style: { background: `rgba(${shares[place] < 0 ? "0, 114, 178" : "213, 94, 0"}, ${0.6 * Math.abs(shares[place])})` },
    }));
    return make("p", { className: "passage" }, make("b", { textContent: coordinate }), " ", ...spans);
  }

  function card(node) {
    const facts = known.get(node);
    const close = make("button", { type: "button", className: "close", textContent: "×" });
    close.setAttribute("aria-label", `Unpin ${node}`);
    close.addEventListener("click", () => unpin(node));
    const list = (pairs) => make("dl", {}, ...pairs.flatMap(([name, value]) =>
      [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    const found = make("article", {}, make("h3", { textContent: node }), close, list(facts.numbers));
    if (facts.tokens.length) found.append(part("Tokens", list(facts.tokens)));
    if (facts.writers) found.append(paths("Reads from", facts.writers), paths("Read by", facts.readers));
    for (const [title, passages] of facts.examples) found.append(part(title, ...passages.map(passage)));
    found.dataset.node = node;
    found.setAttribute("aria-label", node);
    return found;
  }

  function pin(node, opener) {
    cards.set(node, card(node));
    openers.set(node, opener);
    panel.prepend(cards.get(node));
    panel.scrollTop = 0;
    shown(`${node} is pinned.`);
  }

  function unpin(node) {
    const held = cards.get(node);
    const hadFocus = held.contains(document.activeElement);
    held.remove();
    cards.delete(node);
    if (hadFocus) openers.get(node)?.focus();
    openers.delete(node);
    shown(`${node} is no longer pinned.`);
  }

  const toggle = (node, opener) => cards.has(node) ? unpin(node) : pin(node, opener);

  function shown(message) {
    const main = document.querySelector("main"), width = main.clientWidth;
    panel.hidden = cards.size === 0;
    document.body.classList.toggle("pinned", cards.size > 0);
    if (main.clientWidth !== width) window.dispatchEvent(new Event("resize"));  // figures fit again
    status.textContent = message;
    mark();
  }

  // What is pressed, and looks so, are names in tables and nodes of the figure.
  function mark() {
    for (const button of document.querySelectorAll("button.pin"))
      button.setAttribute("aria-pressed", cards.has(button.textContent));
    for (const point of points()) point.setAttribute("aria-pressed", cards.has(nodeOf(point)));
  }

  // Nodes of the figure: plotly keeps a point's customdata, its name, as `data` of what it drew.
  const nodeOf = (point) => point.__data__.data;
  const points = () => [...circuit?.querySelectorAll(".points path") ?? []]
    .filter((point) => known.has(nodeOf(point)));

  // One stop of the tab key for all nodes; arrows go from one to the next.
  function ready() {
    const all = points();
    const current = all.find((point) => point.tabIndex === 0) ?? all[0];
    for (const point of all) {
      point.setAttribute("role", "button");
      point.setAttribute("aria-label", nodeOf(point));
      point.setAttribute("tabindex", point === current ? 0 : -1);
    }
    mark();
  }

  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  circuit?.addEventListener("keydown", (event) => {
    const all = points(), at = all.indexOf(event.target);
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") toggle(nodeOf(event.target), event.target);
    else if (event.key in steps) {
      const next = all[(at + steps[event.key] + all.length) % all.length];
      event.target.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    } else return;
    event.preventDefault();
  });
  circuit?.on("plotly_click", ({ points: [point] }) => {
    if (known.has(point.customdata)) toggle(point.customdata, null);
  });
  circuit?.on("plotly_afterplot", ready);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.pin");
    if (button) toggle(button.textContent, button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && cards.size) unpin([...cards.keys()].at(-1));
  });
  ready();
})();
