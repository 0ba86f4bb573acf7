"use strict";
// The status page. Asks /api/state each second and /api/history each ten; shows, and never acts.
// Text goes in as text, never as HTML: reasons come from strategies and from the exchange.

const STATE_MS = 1000, HISTORY_MS = 10000, MINUTE_S = 60;
const $ = (id) => document.getElementById(id);
const number = (value) => (value === null || value === undefined ? null : Number(value));
// "0.01600000" -> "0.016", "0E-8" -> "0": as botctl shows it.
const plain = (value) => (typeof value === "string" && /^-?\d+(\.\d+)?(E[-+]?\d+)?$/.test(value)
  ? (/E/.test(value) ? String(Number(value)) : value.replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")) : value);
const time = (ns) => new Date(ns / 1e6).toISOString().replace("T", " ").slice(0, 19);
const page = { symbol: null, state: null, history: null, lost: null, charts: null };

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function put(parent, tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

// How a column is headed, and how its values are shown, where that is not as it comes.
const HEADS = { heartbeat_age_ms: "heartbeat age, ms", uptime_s: "uptime, s", memory_mb: "memory, MB", cpu_pct: "CPU, %" };
const cents = (value) => number(value).toFixed(2);
const today = (text) => text.startsWith(time(page.state.time_ns).slice(0, 10));
const SHOWN = { time: (text) => text.slice(today(text) ? 11 : 0, 19), realized_pnl: cents, fees: cents };

function fill(id, columns, rows, empty, isBad = () => false) {
  const table = $(id);
  table.replaceChildren();
  if (!rows.length) { put(put(table, "tr", null), "td", empty); return; }
  const head = put(put(table, "thead", null), "tr", null), body = put(table, "tbody", null);
  for (const column of columns) put(head, "th", HEADS[column] ?? column.replaceAll("_", " "), { scope: "col" });
  for (const row of rows) {
    const line = put(body, "tr", null, isBad(row) ? { "data-mark": "bad" } : {});
    for (const column of columns) {
      const value = row[column];
      const isMissing = value === null || value === undefined || value === "";
      put(line, "td", isMissing ? "-" : String((SHOWN[column] ?? plain)(value)));
    }
  }
}

function showHead() {
  const { status } = page.state ?? {};
  const state = page.lost ? "NO CONTACT" : status.state;
  const reason = page.lost ? `with health since ${page.lost}; what is below may be old. On the host: botctl status`
    : status.state_reason;
  const text = { state, reason, mode: status?.mode ?? "", clock: page.state ? `${time(page.state.time_ns)} UTC` : "" };
  for (const [id, value] of Object.entries(text)) if ($(id).textContent !== value) $(id).textContent = value;
  $("head").dataset.state = state;
  document.title = `${state} ${status?.mode ?? ""} tradehost`;
}

function showAlerts(alerts, isWhole) {
  const list = $("alerts");
  const text = JSON.stringify([alerts, isWhole]);
  if (list.dataset.text === text) return;  // a screen reader reads it once
  list.dataset.text = text;
  list.replaceChildren();
  if (!alerts.length) put(list, "li", `nothing is wrong${isWhole ? ""
    : "; no Alertmanager answers, so this is what the processes themselves tell"}`);
  for (const alert of alerts) {
    const item = put(list, "li", null, { class: "wrong" });
    put(item, "b", `${alert.name} ${alert.subject}`.trim());
    put(item, "span", `${alert.text} `);
    put(item, "a", "what to do", { href: alert.href });
  }
}

function showSymbols(symbols) {
  const nav = $("symbols");
  if (!symbols.includes(page.symbol)) page.symbol = symbols[0] ?? null;
  const text = JSON.stringify([symbols, page.symbol]);
  if (nav.dataset.text === text) return;
  nav.dataset.text = text;
  nav.replaceChildren();
  for (const symbol of symbols) {
    put(nav, "button", symbol, { type: "button", "aria-pressed": String(symbol === page.symbol) })
      .addEventListener("click", () => { page.symbol = symbol; showSymbols(symbols); drawHistory(); drawState(); });
  }
}

// Whether prices are of now: a gateway that is gone, or hears nothing, told its last ones.
function isLive({ processes, stale }, symbol) {
  return processes.some((p) => p.name === "gateway" && p.state === "UP") && !stale.includes(symbol);
}

function showState() {
  const { status, symbols, levels, orders, signals } = page.state;
  showHead();
  showAlerts(page.state.alerts, page.state.has_alertmanager);
  showSymbols(Object.keys(symbols));
  const position = status.positions.find((p) => p.symbol === page.symbol);
  const price = status.prices[page.symbol] ?? {};
  const near = (levels[page.symbol] ?? []).slice().sort((a, b) => b - a);
  const above = near.filter((l) => l > price.last).at(-1), below = near.find((l) => l <= price.last);
  const own = symbols[page.symbol] ?? {};
  $("price-text").textContent = page.symbol === null ? "no symbol" : [
    `${page.symbol} ${own.state ?? ""}`.trim(), `last ${price.last ?? "-"}${price.last && !isLive(status, page.symbol) ? " (old)" : ""}`, `mark ${price.mark ?? "-"}`,
    `resistance ${above ?? "-"}`, `support ${below ?? "-"}`,
    position && number(position.qty) ? `position ${position.qty} at ${position.entry_price}` : "no position",
    position?.stop ? `stop ${position.stop}` : "", position?.take_profit ? `take-profit ${position.take_profit}` : "",
  ].filter(Boolean).join("; ");
  $("equity-text").textContent = `wallet ${page.state.wallet}; open profit and loss ${page.state.unrealized}; `
    + `equity ${page.state.equity} ${page.state.currency}`;
  fill("positions", ["symbol", "qty", "entry_price", "stop", "take_profit", "realized_pnl", "fees", "strategy"],
    status.positions, "no position yet", (row) => row.unprotected_s !== null);
  fill("orders", ["time", "symbol", "leg", "state", "side", "qty", "filled_qty", "trigger_price", "client_order_id"],
    orders, "no open order", (row) => row.state === "UNKNOWN");
  fill("signals", ["time", "outcome", "symbol", "target_qty", "filled_qty", "why", "decided_because"],
    signals, "no signal among the newest events");
  fill("processes", ["name", "state", "pid", "uptime_s", "heartbeat_age_ms", "memory_mb", "cpu_pct"],
    status.processes, "none", (row) => row.state !== "UP");
  drawState();
}

function look() {
  return {
    layout: { background: { color: colour("card") }, textColor: colour("soft"), attributionLogo: false },
    grid: { vertLines: { color: colour("line") }, horzLines: { color: colour("line") } },
    rightPriceScale: { borderColor: colour("line") }, leftPriceScale: { borderColor: colour("line") },
    timeScale: { borderColor: colour("line"), timeVisible: true, secondsVisible: false },
  };
}

function makeCharts() {
  const kit = LightweightCharts;
  const price = kit.createChart($("price"), { autoSize: true, ...look() });
  const equity = kit.createChart($("equity"), { autoSize: true, ...look(), leftPriceScale: { visible: true } });
  const candles = price.addSeries(kit.CandlestickSeries, {});
  page.charts = {
    kit, price, equity, candles, markers: kit.createSeriesMarkers(candles, []), lines: new Map(), shown: null,
    worth: equity.addSeries(kit.LineSeries, { lineWidth: 2, title: "equity" }),
    position: equity.addSeries(kit.LineSeries, {
      lineWidth: 1, lineType: kit.LineType.WithSteps, priceScaleId: "left", title: "position",
      priceFormat: { type: "price", precision: 3, minMove: 0.001 } }),
  };
  paint();
}

function paint() {
  const { price, equity, candles, worth, position } = page.charts;
  price.applyOptions(look());
  equity.applyOptions(look());
  candles.applyOptions({ upColor: colour("up"), downColor: colour("down"), borderVisible: false,
    wickUpColor: colour("up"), wickDownColor: colour("down") });
  worth.applyOptions({ color: colour("link") });
  position.applyOptions({ color: colour("level") });
  for (const line of page.charts.lines.values()) candles.removePriceLine(line);
  page.charts.lines.clear();
}

function minute(ns) { return Math.floor(ns / 1e9 / MINUTE_S) * MINUTE_S; }

function drawHistory() {
  const { history, charts, symbol } = page;
  if (!history || !charts || symbol === null) return;
  const bars = (history.candles[symbol] ?? []).map(([ns, open, high, low, close]) =>
    ({ time: minute(ns), open, high, low, close }));
  charts.candles.setData(bars);
  charts.running = bars.at(-1) ?? null;
  const oldest = bars[0]?.time ?? 0;
  const fills = history.fills.filter((f) => f.symbol === symbol);
  charts.markers.setMarkers(fills.filter((f) => minute(f.time_ns) >= oldest).map((f) => ({
    time: minute(f.time_ns), position: f.side === "buy" ? "belowBar" : "aboveBar",
    shape: f.side === "buy" ? "arrowUp" : "arrowDown", color: colour(f.side === "buy" ? "up" : "down"),
    text: f.cause === "signal" ? f.side : f.cause.replace("_", " ") })));
  charts.worth.setData(series(history.equity.map(([ns, value]) => [ns, number(value)])));
  charts.position.setData(series(history.positions[symbol]?.map(([ns, value]) => [ns, number(value)]) ?? []));
  if (charts.shown !== symbol) {
    charts.price.timeScale().setVisibleLogicalRange({ from: bars.length - 120, to: bars.length + 5 });
    charts.equity.timeScale().fitContent();
    charts.shown = symbol;
  }
}

function series(points) {
  const bySecond = new Map(points.map(([ns, value]) => [Math.floor(ns / 1e9), value]));  // one point a second
  return [...bySecond].sort((a, b) => a[0] - b[0]).map(([at, value]) => ({ time: at, value }));
}

function drawState() {
  const { state, charts, symbol } = page;
  if (!state || !charts || symbol === null) return;
  const last = state.status.prices[symbol]?.last, at = minute(state.time_ns);
  if (last && isLive(state.status, symbol) && charts.running && at >= charts.running.time) {
    const bar = at > charts.running.time ? { time: at, open: last, high: last, low: last, close: last }
      : { ...charts.running, high: Math.max(charts.running.high, last), low: Math.min(charts.running.low, last), close: last };
    charts.candles.update(bar);
    charts.running = bar;
  }
  const position = state.status.positions.find((p) => p.symbol === symbol);
  const wanted = new Map();
  const levels = state.levels[symbol] ?? [];
  const above = Math.min(...levels.filter((l) => l > last)), below = Math.max(...levels.filter((l) => l <= last));
  for (const level of levels) {
    const title = level === above ? "resistance" : level === below ? "support" : "";  // the nearest are named
    wanted.set(`level ${level} ${title}`, { price: level, color: colour("level"), lineStyle: 2, title,
      axisLabelVisible: title !== "" });
  }
  if (position && number(position.qty)) {
    for (const [prices, name, tint] of [[[position.entry_price], "entry", "soft"],
                                        [position.stops_at, "stop", "stop"],  // where they rest, not where planned
                                        [[position.take_profit], "take-profit", "profit"]]) {
      for (const price of prices) if (price !== null) wanted.set(`${name} ${price}`,
        { price: number(price), color: colour(tint), lineStyle: 0, title: name });
    }
  }
  for (const [key, line] of charts.lines) {
    if (!wanted.has(key)) { charts.candles.removePriceLine(line); charts.lines.delete(key); }
  }
  for (const [key, options] of wanted) {
    if (!charts.lines.has(key)) charts.lines.set(key, charts.candles.createPriceLine({ lineWidth: 1, ...options }));
  }
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function follow(path, everyMs, take) {
  for (;;) {
    const began = Date.now();
    try {
      take(await ask(path));
    } catch (error) {
      if (path === "api/state") { page.lost ??= `${new Date().toISOString().slice(11, 19)} UTC`; showHead(); }
    }
    await new Promise((done) => setTimeout(done, Math.max(200, everyMs - (Date.now() - began))));
  }
}

makeCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); drawHistory(); drawState(); });
follow("api/state", STATE_MS, (state) => {
  const isFirst = page.state === null;
  page.state = state;
  page.lost = null;
  showState();
  if (isFirst) drawHistory();
});
follow("api/history", HISTORY_MS, (history) => { page.history = history; drawHistory(); drawState(); });
