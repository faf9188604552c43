// Step 3: starts a job and follows it. The job belongs to the server: a closed page stops nothing.

const RETRY = 1500; // milliseconds until a lost connection is opened again
const STATES = {
  queued: "Waiting for another job to end.",
  running: "Training.",
  stopping: "Stopping: a checkpoint is being saved.",
  paused: "Stopped. A checkpoint is kept.",
  done: "Training is done.",
  failed: "Training failed.",
  cancelled: "Training was cancelled.",
};
/** start: the run's first record. next: the position from which records are read. */
const emptyRun = () => ({ job: null, start: null, next: 0, steps: [], evaluations: [] });
/** draft: the id of the trained rows. ends: stops following the job. */
const training = { draft: null, ends: null, ...emptyRun() };

function forgetTraining() {
  training.ends?.abort();
  Object.assign(training, { draft: lesson.draft?.id ?? null, ...emptyRun() });
}

function showTrain() {
  if (training.draft !== lesson.draft.id) forgetTraining();
  showTraining();
  if (lesson.draft.job) followJob();
}

/** Follows the job until it rests. Opens the connection again when it is lost. */
async function followJob() {
  training.ends?.abort();
  const ends = (training.ends = new AbortController());
  const draft = lesson.draft.id;
  while (!ends.signal.aborted) {
    try {
      const path = `/studio/api/drafts/${draft}/events?after=${training.next}`;
      for await (const update of events(await request(path, { signal: ends.signal }))) takeUpdate(update);
      if (!training.job?.open) return;
    } catch (fault) {
      if (ends.signal.aborted) return;
      byId("train-fault").textContent = said(fault) ?? "";
      if (fault instanceof Refused) return;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

function takeUpdate(update) {
  if (update.error) throw new Refused(200, update.error);
  if (update.start !== training.next) Object.assign(training, { steps: [], evaluations: [] }); // it was written anew
  for (const record of update.records) {
    if (record.kind === "start") training.start = record;
    else if (record.kind === "step") training.steps.push(record);
    else if (record.kind === "evaluation") training.evaluations.push(record);
  }
  training.next = update.next;
  training.job = update.job;
  lesson.draft.state = update.job.state;
  showTraining();
  showSteps();
}

function showTraining() {
  const { job } = training;
  const state = job?.state ?? (lesson.draft.job ? null : "new");
  byId("train-state").textContent = state === "new" ? summaryOfPlan() : stateSaid(state);
  byId("train-fault").textContent = job?.error ?? "";
  byId("train-start").hidden = !["new", "failed", "cancelled", "done"].includes(state);
  byId("train-start").className = state === "new" ? "main" : "";
  byId("train-start").textContent = state === "new" ? "Start training" : "Train anew";
  byId("train-stop").hidden = !job?.open || state === "stopping";
  byId("train-resume").hidden = !job?.resumable;
  byId("train-next").hidden = state !== "done";
  byId("train-stays").hidden = !job?.open;
  byId("train-facts").replaceChildren(...trainingFacts());
  byId("train-curve").replaceChildren(...trainingCurve());
  byId("train-sample").replaceChildren(...trainingSample());
}

function stateSaid(state) {
  const { ahead = 0 } = training.job ?? {};
  if (state === "queued" && ahead > 1) return `Waiting: ${count(ahead)} jobs are before it.`;
  return STATES[state] ?? "";
}

function summaryOfPlan() {
  const { base = "", method = "lora" } = lesson.draft.method;
  const rows = lesson.report ? ` on ${count(lesson.report.rows)} rows` : "";
  const time = lesson.plan ? `, about ${duration(lesson.plan.plans[0].run_seconds)}` : "";
  return `${METHODS[method] ?? method} over ${titleOf(base)}${rows}${time}.`;
}

const RECENT = 20;

function trainingFacts() {
  const { start, steps, evaluations, job } = training;
  const last = steps.at(-1);
  if (!last) return [];
  const recent = steps.slice(-RECENT);
  const seconds = recent.reduce((sum, record) => sum + record.seconds, 0);
  const tokens = recent.reduce((sum, record) => sum + record.tokens, 0);
  const left = ((start?.steps ?? last.step) - last.step) * (seconds / recent.length);
  const held = evaluations.filter((record) => record.loss !== null);
  const facts = [[`${count(last.step)}${start?.steps ? ` of ${count(start.steps)}` : ""}`, "steps"]];
  if (job?.open) facts.push([duration(left), "left"]);
  else if (job?.summary) facts.push([duration(job.summary.total_seconds), "taken"]);
  facts.push([count(Math.round(tokens / seconds)), "tokens a second"]);
  if (last.memory_bytes) facts.push([bytes(last.memory_bytes), "memory"]);
  if (held.length) facts.push([figure(held.at(-1).loss), `held-out loss, ${figure(held[0].loss)} before`]);
  return figureCells(facts);
}

function trainingCurve() {
  const { start, steps, evaluations } = training;
  if (!steps.length && !evaluations.length) return [];
  const losses = steps.map((record) => [record.step, record.loss]);
  const held = evaluations.filter((record) => record.loss !== null).map((record) => [record.step, record.loss]);
  const untrained = held.find(([step]) => step === 0);
  const end = start?.steps ?? steps.at(-1)?.step ?? 0;
  const base = untrained ? [untrained, [end, untrained[1]]] : [];
  const series = [
    ["training", "quiet", losses],
    ["training, smoothed", "a", smoothed(losses)],
    ["untrained base", "base", base],
    ["held-out", "b", held],
  ];
  return [chart("Loss", series, byId("train-curve").clientWidth)];
}

/** Shows the answer to the first held-out question before training and now. */
function trainingSample() {
  const { sample } = training.evaluations.findLast((record) => record.sample) ?? {};
  if (!sample) return [];
  const cells = [
    messageCell("question", sample.prompt ?? ""),
    messageCell("expected", sample.expected ?? ""),
    messageCell("before", sample.before ?? ""),
    messageCell("now", sample.answer ?? "", "assistant"),
  ];
  return [make("h3", {}, "A held-out question"), make("article", { className: "card sample" }, ...cells)];
}

/** Changes the job by one of its verbs: train, stop, resume. */
async function changeJob(verb) {
  await teachSafely(async () => {
    const body = verb === "train" ? lesson.draft.method : {}; // a plan may not have stored it yet
    const job = await studio(draftPath(`/${verb}`), { body });
    if (verb === "train") forgetTraining();
    training.job = job;
    Object.assign(lesson.draft, { job: job.id, state: job.state });
    showTraining();
    showSteps();
    followJob();
  });
}

function beginTrain() {
  for (const [id, verb] of [["train-start", "train"], ["train-stop", "stop"], ["train-resume", "resume"]])
    byId(id).addEventListener("click", () => changeJob(verb));
  byId("train-next").addEventListener("click", () => openStep("judge"));
  whenStepShown.train = showTrain;
  whenStepLeft.train = () => training.ends?.abort();
}
beginTrain();
