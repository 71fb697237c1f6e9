{{- define "audioldm2.name" -}}
{{- if contains "audioldm2" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-audioldm2" (.Release.Name | trunc 40 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "audioldm2.selector" -}}
app.kubernetes.io/name: audioldm2
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "audioldm2.labels" -}}
{{ include "audioldm2.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "audioldm2.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "audioldm2.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Whether something is fetched from the hub at the start. */ -}}
{{- define "audioldm2.fetches" -}}
{{- range .Values.checkpoints }}{{ if .hub }}yes{{ end }}{{ end }}
{{- end }}

{{- define "audioldm2.check" -}}
{{- range $number, $checkpoint := .Values.checkpoints }}
{{- if and (gt $number 0) (not $checkpoint.name) }}
{{- fail (printf "checkpoints[%d]: got no name but expected one: only the first may go without" $number) }}
{{- end }}
{{- if and (eq $number 0) $checkpoint.name }}
{{- fail (printf "checkpoints[0].name: got %q but expected none: the first one's models have their own names" $checkpoint.name) }}
{{- end }}
{{- if and (not $checkpoint.hub) (or (not $.Values.weights.volume) (hasKey $.Values.weights.volume "emptyDir")) }}
{{- fail (printf "checkpoints[%d].hub: got nothing but expected a hub id, or weights.volume other than emptyDir, which is empty" $number) }}
{{- end }}
{{- end }}
{{- if gt (int .Values.autoscaling.min) (int .Values.autoscaling.max) }}
{{- fail (printf "autoscaling.min: got %d but expected at most autoscaling.max, %d" (int .Values.autoscaling.min) (int .Values.autoscaling.max)) }}
{{- end }}
{{- if and (eq (toString .Values.rollingUpdate.maxSurge) "0") (eq (toString .Values.rollingUpdate.maxUnavailable) "0") }}
{{- fail "rollingUpdate: got 0 for both maxSurge and maxUnavailable but expected more for one of them" }}
{{- end }}
{{- end }}
