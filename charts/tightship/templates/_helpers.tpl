{{/* The release's full name: the release, unless it already says tightship. */}}
{{- define "tightship.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the operator's pods; it never changes, since a Deployment's selector can't. */}}
{{- define "tightship.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Not part-of: tightship. That label selects what the operator makes and watches, and Helm made this. */}}
{{- define "tightship.labels" -}}
{{ include "tightship.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "tightship.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tightship.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tightship.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* One name for every release: two operators of one namespace then never act at the same time. */}}
{{- define "tightship.leaseName" -}}
tightship-operator
{{- end -}}
