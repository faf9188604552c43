// Step 3: starts a job and follows it. The job belongs to the server: a closed page stops nothing.

const JOB_STATES = {
  queued: "Waiting for another job to end.",
  running: "Training.",
  stopping: "Stopping: a checkpoint is being saved.",
  paused: "Stopped. A checkpoint is kept.",
  done: "Training is done.",
  failed: "Training failed.",
  cancelled: "Training was cancelled.",
};
const TOGETHER = "Waiting jobs on the same base train together if they fit into memory.";
/** States in which a run can be started. `new`: the draft has no job. */
const STARTABLE = ["new", "failed", "cancelled", "done"];
/**
 * start: the run's first record. next: the position from which records are read.
 * steps, evaluations: the run's records of these kinds.
 */
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

/** Follows the job until it ends or is stopped. */
async function followJob() {
  training.ends?.abort();
  const { signal } = (training.ends = new AbortController());
  const path = draftPath("/events");
  const address = () => `${path}?after=${training.next}`;
  await teachSafely(() => followEvents(address, updateTraining, signal));
}

/** Takes the job's state and new records from an event. Returns whether the job goes on. */
function updateTraining({ job, records, start, next }) {
  if (start !== training.next) Object.assign(training, { steps: [], evaluations: [] }); // rewritten
  for (const record of records) {
    if (record.kind === "start") training.start = record;
    else if (record.kind === "step") training.steps.push(record);
    else if (record.kind === "evaluation") training.evaluations.push(record);
  }
  Object.assign(training, { job, next });
  const isChanged = lesson.draft.state !== job.state;
  lesson.draft.state = job.state;
  if (isChanged) teachSafely(listDrafts); // it names the state
  showTraining();
  showSteps();
  return job.open;
}

function showTraining() {
  keepFocus(["#train-stop", "#train-resume", "#train-next", "#go-train"], showTrainingNow);
}

function showTrainingNow() {
  const { job } = training;
  const state = job?.state ?? (lesson.draft.job ? null : "new");
  const isNew = state === "new";
  byId("train-state").textContent = isNew ? planSummary() : jobStatus(state);
  byId("train-fault").textContent = job?.error ?? "";
  byId("train-start").hidden = !STARTABLE.includes(state);
  byId("train-start").className = isNew ? "main" : "";
  byId("train-start").textContent = isNew ? "Start training" : "Train again";
  byId("train-stop").hidden = !job?.open; // it keeps the focus until Resume takes it
  byId("train-stop").ariaDisabled = String(state === "stopping");
  byId("train-resume").hidden = !job?.resumable;
  byId("train-next").hidden = state !== "done";
  byId("train-stays").hidden = !job?.open;
  byId("train-facts").replaceChildren(...trainingFacts());
  byId("train-curve").replaceChildren(...trainingCurve());
  byId("train-sample").replaceChildren(...trainingSample());
}

function jobStatus(state) {
  const { ahead = 0, together = 0 } = training.job ?? {};
  if (state === "queued" && ahead > 1)
    return `Waiting: ${count(ahead)} jobs are before it. ${TOGETHER}`;
  if (state === "running" && together) return `Training, together with ${otherJobs(together)}.`;
  if (state === "running" && !training.steps.length)
    return "Training: the base is being loaded and the rows prepared; no step is done yet.";
  return JOB_STATES[state] ?? "";
}

const otherJobs = (number) => (number === 1 ? "1 other job" : `${count(number)} other jobs`);

function planSummary() {
  const { base = "", method = "lora" } = lesson.draft.method;
  const rows = lesson.report ? ` on ${countOf(lesson.report.rows, "row")}` : "";
  const time = lesson.plan ? `, about ${duration(lesson.plan.plans[0].run_seconds)}` : "";
  return `${METHODS[method] ?? method} over ${titleOf(base)}${rows}${time}.`;
}

/** Steps from which the speed is computed. */
const RECENT = 20;
const sumOf = (records, name) => records.reduce((sum, record) => sum + record[name], 0);

const measuredLosses = () => training.evaluations.filter((record) => record.loss !== null);

function trainingFacts() {
  const { start, steps, job } = training;
  const last = steps.at(-1);
  if (!last) return [];
  const recent = steps.slice(-RECENT);
  const seconds = sumOf(recent, "seconds");
  const jobs = 1 + (job?.together ?? 0); // each counts its share of the seconds
  const secondsLeft = ((start?.steps ?? last.step) - last.step) * (seconds / recent.length) * jobs;
  const losses = measuredLosses().map((record) => figure(record.loss));
  const stepsInAll = start?.steps ? ` of ${count(start.steps)}` : "";
  const facts = [[`${count(last.step)}${stepsInAll}`, "steps"]];
  if (job?.open) facts.push([duration(secondsLeft), "left"]);
  else if (job?.summary) facts.push([duration(job.summary.total_seconds), "taken"]);
  facts.push([count(Math.round(sumOf(recent, "tokens") / seconds)), "tokens a second"]);
  if (last.memory_bytes) facts.push([bytes(last.memory_bytes), "memory"]);
  if (losses.length) facts.push([losses.at(-1), `held-out loss, ${losses[0]} before`]);
  return figureCells(facts);
}

function trainingCurve() {
  const { start, steps } = training;
  const pointOf = (record) => [record.step, record.loss];
  const losses = steps.map(pointOf);
  const heldOut = measuredLosses().map(pointOf);
  if (!losses.length && !heldOut.length) return [];
  const untrained = heldOut.find(([step]) => step === 0);
  const end = start?.steps ?? steps.at(-1)?.step ?? 0;
  const series = [
    ["training", "quiet", losses],
    ["training, smoothed", "a", smoothed(losses)],
    ["untrained base", "base", untrained ? [untrained, [end, untrained[1]]] : []],
    ["held-out", "b", heldOut],
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
  const card = make("article", { className: "card sample" }, ...cells);
  return [make("h3", {}, "A held-out question"), card];
}

/** Changes the job by one of its verbs: train, stop, resume. */
async function changeJob(verb) {
  if (verb === "stop" && training.job?.state === "stopping") return;
  const isChanged = await teachSafely(async () => {
    const body = verb === "train" ? lesson.draft.method : {}; // a plan may not have stored it yet
    const job = await studio(draftPath(`/${verb}`), { body });
    if (verb === "train") forgetTraining();
    training.job = job;
    Object.assign(lesson.draft, { job: job.id, state: job.state });
    showTraining();
    showSteps();
    await listDrafts(); // it names the state
  });
  if (isChanged) followJob();
}

function beginTrain() {
  for (const [button, verb] of Object.entries({ start: "train", stop: "stop", resume: "resume" }))
    byId(`train-${button}`).addEventListener("click", () => changeJob(verb));
  byId("train-next").addEventListener("click", () => openStep("judge"));
  whenStepShown.train = showTrain;
  whenStepLeft.train = () => training.ends?.abort();
}
beginTrain();
