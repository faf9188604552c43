// Step 1 as a whole: before an upload the place to drop a file, after it the rows and their check.

async function showRows() {
  byId("upload").hidden = lesson.draft !== null;
  byId("rows-open").hidden = lesson.draft === null;
  if (lesson.draft === null) return;
  showChoices();
  showColumnChoices();
  showPreview();
  if (lesson.report === null) await checkChosenRows();
  else showReport(lesson.report);
}
whenStepShown.rows = showRows;
byId("rows-next").addEventListener("click", () => openStep("method"));
