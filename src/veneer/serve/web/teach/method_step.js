// Step 2: the method and its settings, and what they cost on this machine.

const KINDS = {
  task: "a task",
  style: "a tone or style",
  format: "a form of answers",
  instructions: "to follow instructions",
  knowledge: "new knowledge",
};
const METHODS = {
  lora: "lora: low-rank updates",
  qlora: "qlora: LoRA over a base in 4 bits",
  dora: "dora: LoRA with trained magnitudes",
  prefix: "prefix: trained keys and values",
  bottleneck: "bottleneck: small added layers",
};
/** ends: stops the request for the last plan. */
const planning = { ends: null };

const chosenMethod = () => ({
  base: byId("method-base").value,
  kind: byId("method-kind").value,
  method: byId("method-name").value,
  settings: chosenSettings(),
});

async function showMethod() {
  const { base = "", kind = "task", method = "lora", settings = {} } = lesson.draft.method;
  showBases(base);
  byId("method-kind").value = kind;
  byId("method-name").value = method;
  showObjectives(settings[OBJECTIVE]);
  showMethodSettings(method, settings);
  byId("method-compared").replaceChildren();
  await planChosen();
}

/**
 * Asks for the plan of the chosen run, and shows it in a place. An earlier request that still
 * runs is dropped. compare: plans every method. partsOf: returns the parts that show the answer.
 */
async function askForPlan(place, compare, partsOf) {
  planning.ends?.abort();
  const { signal } = (planning.ends = new AbortController());
  lesson.draft.method = chosenMethod();
  place.querySelector(".planning")?.remove();
  place.prepend(make("p", { className: "soft planning" }, "Planning …")); // above the last plan
  try {
    const body = { ...lesson.draft.method, compare };
    const answer = await studio(draftPath("/plan"), { body, signal });
    place.replaceChildren(...partsOf(answer));
    if (!compare) lesson.planFault = answer.plans.length ? "" : "No plan was made.";
    return answer;
  } catch (fault) {
    if (signal.aborted) return null;
    if (!compare) lesson.planFault = "What is red above has to change first.";
    const look = { className: "bad fault", role: "alert" };
    place.replaceChildren(make("p", look, faultText(fault) ?? ""));
    return null;
  }
}

async function planChosen() {
  Object.assign(lesson, { plan: null, planFault: "" });
  showSteps();
  if (lesson.rowsFault !== null) return byId("method-plan").replaceChildren();
  lesson.plan = await askForPlan(byId("method-plan"), false, planParts);
  showSteps();
}

function chooseMethod(method) {
  byId("method-name").value = method;
  showMethodSettings(method, chosenSettings());
  planChosen();
}

function takeAdvice(advice) {
  const method = advice.quantize ? "qlora" : advice.method;
  byId("method-name").value = method;
  const { rank, alpha, rslora } = advice.settings;
  const settings = { ...chosenSettings(), learning_rate: advice.learning_rate ?? undefined };
  if (rank)
    Object.assign(settings, {
      "method.rank": rank,
      "method.alpha": alpha,
      "method.rslora": rslora,
    });
  keepFocus(["#method-name"], () => {
    showMethodSettings(method, settings);
    planChosen(); // removes the advice
  });
}

function changeSettings() {
  showTeacher();
  planChosen();
}

function beginMethod() {
  byId("method-kind").append(...optionsOf(KINDS));
  byId("method-name").append(...optionsOf(METHODS));
  byId("method-kind").addEventListener("change", planChosen);
  byId("method-name").addEventListener("change", (event) => chooseMethod(event.target.value));
  byId("method-objective").addEventListener("change", changeSettings);
  byId("method-next").addEventListener("click", () => openStep("train"));
  for (const id of ["main-settings", "more-settings"])
    byId(id).addEventListener("change", changeSettings);
  const compareMethods = () => askForPlan(byId("method-compared"), true, comparisonParts);
  byId("method-compare").addEventListener("click", compareMethods);
  whenStepShown.method = showMethod;
}
beginMethod();
