"use strict";
const find = (all) => [...document.querySelectorAll(all)];
const grids = JSON.parse(document.getElementById("grids").textContent);
let seen = null; // images of the pictures that are shown, as far as each run has them; null: the newest

// ---- pictures: one slider for each run, and all show the same number of images seen
function show() {
  find(".grids").forEach((figure, run) => {
    const all = grids[run];
    figure.hidden = !all.length;
    if (!all.length) return;
    const place = seen === null ? all.length - 1 : Math.max(0, all.findLastIndex((grid) => grid.images <= seen));
    const [image, slider] = [figure.querySelector("img"), figure.querySelector("input")];
    slider.max = all.length - 1;
    slider.value = place;
    slider.disabled = figure.querySelector("button").disabled = all.length < 2;
    if (image.getAttribute("src") !== all[place].source) image.src = all[place].source;
    const text = `${all[place].images.toLocaleString("en")} images seen (${place + 1} of ${all.length})`;
    slider.setAttribute("aria-valuetext", text);
    figure.querySelector("figcaption").textContent = text;
  });
}

// The strip with the images seen, which the caption says: white in a dark page, and too small to read on a phone
function hideStrip(image) {
  const height = image.naturalHeight - Number(image.dataset.strip);
  image.style.aspectRatio = height > 0 ? `${image.naturalWidth} / ${height}` : "auto";
}

find(".grids img").forEach((image) => {
  image.addEventListener("load", () => hideStrip(image));
  if (image.complete) hideStrip(image);
});

function choose(run, place) {
  seen = place >= grids[run].length - 1 ? null : grids[run][place].images;
  show();
}

let playing = 0;
function stop() {
  clearInterval(playing);
  playing = 0;
  find(".grids button").forEach((button) => (button.textContent = "Play"));
}

find(".grids").forEach((figure, run) => {
  const [slider, button] = [figure.querySelector("input"), figure.querySelector("button")];
  slider.addEventListener("input", () => {
    stop();
    choose(run, Number(slider.value));
  });
  button.addEventListener("click", () => {
    const runs = Boolean(playing);
    stop();
    if (runs) return;
    button.textContent = "Stop";
    choose(run, 0);
    playing = setInterval(() => {
      choose(run, Number(slider.value) + 1);
      if (seen === null) stop();
    }, 400);
  });
});

// ---- curves: the values under the pointer, in the legends of all of them
function digits(value) {
  const size = Math.abs(value);
  const places = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : null;
  const text = places === null ? String(Number(value.toPrecision(3))) : value.toLocaleString("en", { maximumFractionDigits: places, minimumFractionDigits: places });
  return text.replace("-", "−");
}

function read(images) {
  find(".chart").forEach((chart) => {
    chart.lines ??= JSON.parse(chart.dataset.lines);
    const last = Math.max(...chart.lines.map((line) => line.images.at(-1)));
    const wanted = images ?? last;
    const near = chart.lines.map((line) => {
      const distances = line.images.map((x) => Math.abs(x - wanted));
      return distances.indexOf(Math.min(...distances));
    });
    const at = images === null ? last : chart.lines[0].images[near[0]];
    chart.querySelectorAll(".legend b").forEach((value, k) => (value.textContent = digits(chart.lines[k].values[near[k]])));
    chart.querySelector(".at").textContent = `at ${at.toLocaleString("en")} images`;
    const cursor = chart.querySelector(".cursor");
    const x = images === null ? "-9" : `${(100 * at) / Number(chart.dataset.right)}%`;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.classList.toggle("shown", images !== null);
  });
}

let reading = false;
document.addEventListener("pointermove", (event) => {
  const plot = event.target.closest(".chart > svg");
  if (plot) {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    read(share * Number(plot.parentElement.dataset.right));
  } else if (reading) {
    read(null);
  }
  reading = Boolean(plot);
});

// ---- news, while the page is served
async function ask() {
  const news = document.getElementById("news");
  try {
    const answer = await fetch("state.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const state = await answer.json();
    for (const [id, html] of Object.entries(state.parts)) {
      const element = document.getElementById(id);
      if (!element || ask.parts[id] === html) continue;
      element.innerHTML = html;
      element.closest("details")?.toggleAttribute("hidden", !html.trim());
    }
    ask.parts = state.parts;
    state.grids.forEach((every, run) => (grids[run] = every));
    show();
    news.textContent = state.written;
  } catch {
    news.textContent = "facet watch no longer answers: this is what it said last.";
  }
  setTimeout(ask, 3000);
}
ask.parts = {};

show();
if ("live" in document.body.dataset) setTimeout(ask, 3000);
