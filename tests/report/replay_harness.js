// Plays the replay of a report without a browser. Standard input: {html, actions}. Standard output: what the replay
// shows at the beginning and after each action, as JSON.
//
// Actions: ["key", name, target], ["click", id], ["input", id, value], ["change", id, value], ["wait", milliseconds].
"use strict";
const { html, actions, reduced } = JSON.parse(require("fs").readFileSync(0, "utf8"));

function makeElement(tag) {
  const attributes = new Map(), listeners = new Map();
  const element = {
    tagName: tag.toUpperCase(), style: {}, className: "", title: "", children: [], hidden: false,
    append(child) { element.children.push(child); },
    setAttribute(name, value) { attributes.set(name, value); },
    getAttribute(name) { return attributes.get(name); },
    removeAttribute(name) { attributes.delete(name); },
    addEventListener(name, listener) { listeners.set(name, listener); },
    emit(name, event) { if (listeners.has(name)) listeners.get(name)(event); },
    classList: {
      add(name) { element.className = [...element.className.split(" ").filter(Boolean), name].join(" "); },
      remove(name) { element.className = element.className.split(" ").filter((other) => other !== name).join(" "); },
    },
    set textContent(text) { element.children = []; element.text = text; },
    get textContent() { return element.text; },
  };
  return element;
}

const elements = new Map();
for (const [, tag, id] of html.matchAll(/<(\w+)[^>]* id="(replay[\w-]*)"/g)) elements.set(id, makeElement(tag));
const find = (id) => elements.get(id);
find("replay").hidden = / id="replay"[^>]* hidden>/.test(html);
find("replay-data").text = /<script type="application\/json" id="replay-data">(.*?)<\/script>/.exec(html)[1];
find("replay-play").text = / id="replay-play">(.*?)</.exec(html)[1];
find("replay-choice").value = "0";
find("replay-speed").options = [...html.matchAll(/<option value="(\d+)"[^>]*>\d+ calls? per second/g)].map(
  ([, value]) => ({ value }));
find("replay-speed").value = /<option value="(\d+)" selected>/.exec(html)[1];

let clock = 0, timers = new Map(), made = 0;
const globals = {
  document: { getElementById: find, createElement: makeElement },
  matchMedia: () => ({ matches: Boolean(reduced) }),
  setInterval(act, period) { timers.set(++made, { act, period, next: clock + period }); return made; },
  clearInterval(timer) { timers.delete(timer); },
};

function wait(milliseconds) {
  const end = clock + milliseconds;
  for (;;) {
    const due = [...timers.values()].filter(({ next }) => next <= end).sort((a, b) => a.next - b.next)[0];
    if (!due) break;
    clock = due.next;
    due.next += due.period;
    due.act();
  }
  clock = end;
}

function perform([kind, what, value]) {
  if (kind === "wait") return wait(what);
  if (kind === "key") {
    let prevented = false;
    find("replay").emit("keydown", { key: what, target: find(value), preventDefault() { prevented = true; } });
    return prevented;
  }
  if (value !== undefined) find(what).value = value;
  return find(what).emit(kind, {});
}

function look(prevented) {
  return {
    prevented,
    hidden: find("replay").hidden,
    count: find("replay-count").textContent,
    button: find("replay-play").textContent,
    slider: [Number(find("replay-slider").value), find("replay-slider").max],
    speed: find("replay-speed").value,
    tokens: find("replay-text").children.map((span) => ({
      text: span.textContent,
      color: [span.style.backgroundColor, span.style.color],
      title: span.title,
      state: span.className,
      silent: span.getAttribute("aria-hidden") === "true",
    })),
  };
}

const script = /<script>(.*?)<\/script>/s.exec(html)[1];
new Function(...Object.keys(globals), script)(...Object.values(globals));
process.stdout.write(JSON.stringify([look(), ...actions.map((action) => look(perform(action)))]));
