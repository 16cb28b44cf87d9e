"use strict";
const tip = document.getElementById("tip");

// A result, its outline, its tag and its row share a key: pointing at one lights all.
function light(element) {
  document.querySelectorAll(".on").forEach((other) => other.classList.remove("on"));
  const key = element && element.dataset.key;
  if (key) document.querySelectorAll(`[data-key="${CSS.escape(key)}"]`).forEach((other) => other.classList.add("on"));
  tip.hidden = !(element && element.dataset.tip);
  if (!tip.hidden) tip.textContent = element.dataset.tip;
}

function follow(event) {
  if (tip.hidden) return;
  const right = event.clientX + tip.offsetWidth + 24 > innerWidth;
  tip.style.left = `${Math.max(4, event.clientX + (right ? -tip.offsetWidth - 14 : 14))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
}

document.addEventListener("pointerover", (event) => { light(event.target.closest("[data-key]")); follow(event); });
document.addEventListener("pointermove", follow);
document.addEventListener("focusin", (event) => light(event.target.closest("[data-key]")));
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

document.querySelectorAll("button[data-switch]").forEach((button) => button.addEventListener("click", () => {
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  button.closest(".look").classList.toggle(`no-${button.dataset.switch}`, !on);
}));

document.querySelectorAll(".stage.pair").forEach((stage) => {
  const range = stage.closest(".look").querySelector("input[type=range]");
  const show = () => stage.style.setProperty("--cut", `${range.value}%`);
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    range.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  range.addEventListener("input", show);
  // A tap is for the result under it; only a pointer that moves takes the slider along.
  let start = null;
  stage.addEventListener("pointerdown", (event) => { start = event.clientX; });
  stage.addEventListener("pointermove", (event) => {
    if (!event.buttons) start = null;
    if (start === null || (Math.abs(event.clientX - start) < 4 && !stage.hasPointerCapture(event.pointerId))) return;
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  show();
});
